/* The four passes over a tensor: local moments, normalize, and the two of the backward.
 *
 * A tensor is (A, C, B): A samples of C channels of B adjacent values. If the channel is the fastest axis, B is 1 and A
 * counts rows. Values are fp32, or bf16 if `bf16` is set; all vectors are (C) in fp32. Sums are made in fp32 within a
 * span of at most SPAN values and in fp64 across spans.
 *
 * The file is compiled once for each instruction set, which ISA names; see build.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define JOIN_(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_(name, isa)
#define PASS(name) void JOIN(name, ISA)
#define INLINE static inline __attribute__((always_inline)) /* for the constants in an input */

enum {
    STREAMED = 1 << 18, /* values of an output that is written past the caches, or more */
    TILE = 512,        /* channels whose sums and factors are at hand, in the L1 cache */
    SPAN = 2048,       /* values of one channel that are summed in fp32 */
    ROW_SPAN = 256,    /* likewise where a channel's values are added one after the other */
    FIRST_SPAN = 256,  /* values of the first span, which is read twice and should stay in the L2 cache */
    FIRST_ROWS = 8,
    ROWS = 4,          /* rows that are summed at once: one access to the sums for all of them */
    AHEAD = 4096,      /* bytes */
};

#ifdef __AVX__
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* The tensors that a pass reads. `bf16` and `graded`, whether there is a dy, are constants where a pass is called. */
typedef struct {
    const void *x, *dy;
    int bf16, graded;
    int64_t A, C, B;
} input;

/* The part of a tile that is summed at once: `count` values of each channel, in rows if B is 1. */
typedef struct { int64_t a, b, count; } span;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float load(const void *p, int64_t i, int bf16) {
    if (!bf16) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE floats load_lanes(const void *p, int64_t i, int bf16) {
    floats value;
    if (bf16) {
        halves half;
        memcpy(&half, (const uint16_t *)p + i, sizeof half);
        words bits = __builtin_convertvector(half, words) << 16;
        memcpy(&value, &bits, sizeof value);
    } else {
        memcpy(&value, (const float *)p + i, sizeof value);
    }
    return value;
}

/* Rounds to nearest, ties to even. A NaN becomes the one of all bits, as in torch: that needs no selection. */
INLINE void store(void *p, int64_t i, float value, int bf16) {
    if (!bf16) { ((float *)p)[i] = value; return; }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    ((uint16_t *)p)[i] = (uint16_t)((rounded | -(uint32_t)(value != value)) >> 16);
}

/* Fetches what the sums read soon: several rows at once are no stream that a CPU recognizes. */
INLINE void prefetch_rows(input n, int64_t at, int64_t width) {
    int64_t size = n.bf16 ? 2 : 4;
    for (int64_t row = 0; row < ROWS; row++) {
        for (int64_t c = 0; c < width; c += 64 / size) {
            int64_t ahead = (at + row * n.C + c) * size + AHEAD;
            __builtin_prefetch((const char *)n.x + ahead);
            if (n.graded) __builtin_prefetch((const char *)n.dy + ahead);
        }
    }
}

/* r[c] += sum g, q[c] += sum g * d of `rows` rows from `at` on, with d = x - shift, and g = dy, or d without a dy. */
INLINE void sum_rows(input n, int64_t at, int rows, int64_t width, const float *shift, float *r, float *q) {
    #pragma omp simd
    for (int64_t c = 0; c < width; c++) {
        float sum = 0, product = 0;
        for (int k = 0; k < rows; k++) {
            int64_t i = at + k * n.C + c;
            float d = load(n.x, i, n.bf16) - shift[c], g = n.graded ? load(n.dy, i, n.bf16) : d;
            sum += g;
            product += g * d;
        }
        r[c] += sum;
        q[c] += product;
    }
}

/* The same of `count` adjacent values of one channel. */
INLINE void sum_run(input n, int64_t at, int64_t count, float shift, float *r, float *q) {
    enum { CHAINS = 4 }; /* independent sums, because an addition takes several cycles */
    floats sums[CHAINS] = {{0}}, products[CHAINS] = {{0}};
    int64_t i = at, end = at + count;
    for (; i + CHAINS * LANES <= end; i += CHAINS * LANES) {
        for (int k = 0; k < CHAINS; k++) {
            floats d = load_lanes(n.x, i + k * LANES, n.bf16) - shift;
            floats g = n.graded ? load_lanes(n.dy, i + k * LANES, n.bf16) : d;
            sums[k] += g;
            products[k] += g * d;
        }
    }
    for (; i + LANES <= end; i += LANES) {
        floats d = load_lanes(n.x, i, n.bf16) - shift, g = n.graded ? load_lanes(n.dy, i, n.bf16) : d;
        sums[0] += g;
        products[0] += g * d;
    }
    floats sum_lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    floats product_lanes = (products[0] + products[1]) + (products[2] + products[3]);
    float sum = 0, product = 0;
    for (; i < end; i++) {
        float d = load(n.x, i, n.bf16) - shift, g = n.graded ? load(n.dy, i, n.bf16) : d;
        sum += g;
        product += g * d;
    }
    for (int k = 0; k < LANES; k++) {
        sum += sum_lanes[k];
        product += product_lanes[k];
    }
    *r += sum;
    *q += product;
}

INLINE void sum_span(input n, span s, int64_t c0, int64_t width, const float *shift, float *r, float *q) {
    int64_t at = (s.a * n.C + c0) * n.B + s.b, row = 0;
    if (n.B == 1) {
        for (; row + ROWS <= s.count; row += ROWS) {
            prefetch_rows(n, at + row * n.C, width);
            sum_rows(n, at + row * n.C, ROWS, width, shift, r, q);
        }
        for (; row < s.count; row++) sum_rows(n, at + row * n.C, 1, width, shift, r, q);
    } else {
        for (int64_t c = 0; c < width; c++) sum_run(n, at + c * n.B, s.count, shift[c], r + c, q + c);
    }
}

/* Advances to the next span; 0 after the last one. Starts from a zeroed span, whose successor is a short one. */
INLINE int next_span(span *s, input n) {
    int first = s->count == 0;
    if (n.B == 1) {
        s->a += s->count;
        s->count = min(n.A - s->a, first ? FIRST_ROWS : ROW_SPAN);
        return s->a < n.A;
    }
    s->b += s->count;
    if (s->b == n.B) { s->b = 0; s->a++; }
    s->count = min(n.B - s->b, first ? FIRST_SPAN : SPAN);
    return s->a < n.A;
}

/* Mean and 1 / sqrt(biased variance + eps).
 *
 * Each span is summed about the mean of those before it, the first one about its own mean, which a pass before has
 * found. So the cancellation in sum(d^2) - sum(d)^2 / n is bounded by the variance between spans, however far from
 * zero the mean is, and no other span is read twice. Spans are merged by Chan's formula. */
INLINE void moments(input n, double eps, float *mean_out, float *invstd_out) {
    for (int64_t c0 = 0; c0 < n.C; c0 += TILE) {
        int64_t width = min(n.C - c0, TILE), merged = 0, waiting = 0;
        float shift[TILE] = {0}, r[TILE] = {0}, q[TILE] = {0};
        double mean[TILE] = {0}, m2[TILE] = {0};
        span s = {0};
        int more = next_span(&s, n);
        sum_span(n, s, c0, width, shift, r, q);
        for (int64_t c = 0; c < width; c++) {
            shift[c] = r[c] / (float)s.count;
            r[c] = q[c] = 0;
        }
        while (more) {
            sum_span(n, s, c0, width, shift, r, q);
            waiting += s.count;
            more = next_span(&s, n);
            if (merged > 0 && more && waiting < ROW_SPAN) continue;
            double each = 1.0 / waiting, share = (double)waiting / (merged + waiting), between = merged * share;
            for (int64_t c = 0; c < width; c++) {
                double offset = r[c] * each, delta = shift[c] - mean[c] + offset;
                mean[c] += delta * share;
                m2[c] += q[c] - r[c] * offset + delta * delta * between;
                shift[c] = (float)mean[c];
                r[c] = q[c] = 0;
            }
            merged += waiting;
            waiting = 0;
        }
        for (int64_t c = 0; c < width; c++) {
            double var = m2[c] / merged;
            mean_out[c0 + c] = (float)mean[c];
            invstd_out[c0 + c] = (float)(1 / sqrt((var < 0 ? 0 : var) + eps));
        }
    }
}

/* sum(dy) and sum(dy * (x - mean)). */
INLINE void reduce(input n, const float *mean, float *sum_dy, float *sum_dy_xmu) {
    for (int64_t c0 = 0; c0 < n.C; c0 += TILE) {
        int64_t width = min(n.C - c0, TILE), waiting = 0;
        float r[TILE] = {0}, q[TILE] = {0};
        double sum[TILE] = {0}, product[TILE] = {0};
        span s = {0};
        int more = next_span(&s, n);
        while (more) {
            sum_span(n, s, c0, width, mean + c0, r, q);
            waiting += s.count;
            more = next_span(&s, n);
            if (more && waiting < ROW_SPAN) continue;
            for (int64_t c = 0; c < width; c++) {
                sum[c] += r[c];
                product[c] += q[c];
                r[c] = q[c] = 0;
            }
            waiting = 0;
        }
        for (int64_t c = 0; c < width; c++) {
            sum_dy[c0 + c] = (float)sum[c];
            sum_dy_xmu[c0 + c] = (float)product[c];
        }
    }
}

/* out = slope * (x - mean) + shift, and dy_scale * dy on top of it. */
typedef struct {
    void *out;
    const float *mean;
    float slope[TILE], shift[TILE], dy_scale[TILE];
} map;

/* Rounded as by `store`. A `streamed` store is past the caches, which the rest of a large tensor would displace anyway:
 * it saves reading what is overwritten. */
INLINE void store_lanes(void *p, int64_t i, floats value, int bf16, int streamed) {
    if (bf16) {
        words bits;
        memcpy(&bits, &value, sizeof bits);
        words rounded = bits + 0x7fff + (bits >> 16 & 1);
        halves half = __builtin_convertvector((rounded | (words)(value != value)) >> 16, halves);
        memcpy((uint16_t *)p + i, &half, sizeof half);
        return;
    }
#if defined(__AVX__)
    if (streamed) { __builtin_ia32_movntps256((float *)p + i, value); return; }
#elif defined(__SSE2__)
    if (streamed) { __builtin_ia32_movntps((float *)p + i, value); return; }
#endif
    memcpy((float *)p + i, &value, sizeof value);
}

/* Whether all vectors of the output are aligned, and it is large enough. */
INLINE int streams(input n, const map *m) {
    int64_t adjacent = n.B == 1 ? n.C : n.B;
    return !n.bf16 && adjacent % LANES == 0 && (uintptr_t)m->out % sizeof(floats) == 0 && n.A * n.C * n.B >= STREAMED;
}

/* One vector of the output at `at`, or one value. */
#define WITHOUT_DY(load, at, mean, slope, shift) ((slope) * (load(n.x, at, n.bf16) - (mean)) + (shift))
#define MAPPED(load, at, mean, slope, shift, dy_scale)                                                        \
    (n.graded ? WITHOUT_DY(load, at, mean, slope, shift) + (dy_scale) * load(n.dy, at, n.bf16)                \
              : WITHOUT_DY(load, at, mean, slope, shift))

INLINE void map_rows(input n, const map *m, int64_t c0, int64_t width, int streamed) {
    for (int64_t a = 0; a < n.A; a++) {
        int64_t at = a * n.C + c0, c = 0;
        for (; c + LANES <= width; c += LANES)
            store_lanes(m->out, at + c,
                        MAPPED(load_lanes, at + c, load_lanes(m->mean, c, 0), load_lanes(m->slope, c, 0),
                               load_lanes(m->shift, c, 0), load_lanes(m->dy_scale, c, 0)), n.bf16, streamed);
        for (; c < width; c++)
            store(m->out, at + c, MAPPED(load, at + c, m->mean[c], m->slope[c], m->shift[c], m->dy_scale[c]), n.bf16);
    }
}

INLINE void map_runs(input n, const map *m, int64_t c0, int64_t width, int streamed) {
    for (int64_t a = 0; a < n.A; a++) {
        for (int64_t c = 0; c < width; c++) {
            float mean = m->mean[c], slope = m->slope[c], shift = m->shift[c], dy_scale = n.graded ? m->dy_scale[c] : 0;
            int64_t at = (a * n.C + c0 + c) * n.B, end = at + n.B;
            for (; at + LANES <= end; at += LANES)
                store_lanes(m->out, at, MAPPED(load_lanes, at, mean, slope, shift, dy_scale), n.bf16, streamed);
            for (; at < end; at++)
                store(m->out, at, MAPPED(load, at, mean, slope, shift, dy_scale), n.bf16);
        }
    }
}

INLINE void map_tile(input n, const map *m, int64_t c0, int64_t width) {
    if (streams(n, m)) {
        if (n.B == 1) map_rows(n, m, c0, width, 1);
        else map_runs(n, m, c0, width, 1);
#if defined(__SSE2__)
        __builtin_ia32_sfence(); /* before anything that tells another thread of the output */
#endif
    } else {
        if (n.B == 1) map_rows(n, m, c0, width, 0);
        else map_runs(n, m, c0, width, 0);
    }
}

PASS(moments)(const void *x, int bf16, int64_t A, int64_t C, int64_t B, double eps, float *mean, float *invstd) {
    if (bf16) moments((input){x, 0, 1, 0, A, C, B}, eps, mean, invstd);
    else moments((input){x, 0, 0, 0, A, C, B}, eps, mean, invstd);
}

/* y = (x - mean) * invstd * weight + bias; weight and bias may be null. */
PASS(normalize)(const void *x, void *y, int bf16, int64_t A, int64_t C, int64_t B, const float *mean,
                const float *invstd, const float *weight, const float *bias) {
    for (int64_t c0 = 0; c0 < C; c0 += TILE) {
        int64_t width = min(C - c0, TILE);
        map m;
        m.out = y;
        m.mean = mean + c0;
        for (int64_t c = 0; c < width; c++) {
            m.slope[c] = weight ? invstd[c0 + c] * weight[c0 + c] : invstd[c0 + c];
            m.shift[c] = bias ? bias[c0 + c] : 0;
        }
        if (bf16) map_tile((input){x, 0, 1, 0, A, C, B}, &m, c0, width);
        else map_tile((input){x, 0, 0, 0, A, C, B}, &m, c0, width);
    }
}

PASS(reduce)(const void *dy, const void *x, int bf16, int64_t A, int64_t C, int64_t B, const float *mean,
             float *sum_dy, float *sum_dy_xmu) {
    if (bf16) reduce((input){x, dy, 1, 1, A, C, B}, mean, sum_dy, sum_dy_xmu);
    else reduce((input){x, dy, 0, 1, A, C, B}, mean, sum_dy, sum_dy_xmu);
}

/* dx = weight * invstd * (dy - sum_dy / count - (x - mean) * invstd^2 * sum_dy_xmu / count). */
PASS(finish)(const void *dy, const void *x, void *dx, int bf16, int64_t A, int64_t C, int64_t B, const float *mean,
             const float *invstd, const float *weight, const float *sum_dy, const float *sum_dy_xmu, double count) {
    for (int64_t c0 = 0; c0 < C; c0 += TILE) {
        int64_t width = min(C - c0, TILE);
        map m;
        m.out = dx;
        m.mean = mean + c0;
        for (int64_t c = 0; c < width; c++) {
            double s = invstd[c0 + c], scale = weight ? s * weight[c0 + c] : s;
            m.dy_scale[c] = (float)scale;
            m.slope[c] = (float)(-scale * s * s * sum_dy_xmu[c0 + c] / count);
            m.shift[c] = (float)(-scale * sum_dy[c0 + c] / count);
        }
        if (bf16) map_tile((input){x, dy, 1, 1, A, C, B}, &m, c0, width);
        else map_tile((input){x, dy, 0, 1, A, C, B}, &m, c0, width);
    }
}

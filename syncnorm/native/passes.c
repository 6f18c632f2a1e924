/* The four passes over a tensor: local moments, normalize, and the two of the backward.
 *
 * A tensor is (A, C, B): A samples of C channels of B adjacent values. If the channel is the fastest axis, B is 1 and A
 * counts rows. Values are fp32, or bf16 if `bf16` is set; all vectors are (C) in fp32. Sums are made in fp32 within a
 * span of at most SPAN values and in fp64 across spans.
 *
 * The file is compiled once for each instruction set, which ISA names; see build.py. */

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two bf16 are read as one little-endian word"
#endif

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
    ROW_SPAN = 256,    /* the same where a channel's values are added one after the other */
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

/* What one load gives: LANES values of fp32 in the first part, or 2 * LANES of bf16. A word holds two of those, and is
 * widened by a shift or a mask, without moving anything between lanes: one part is the values of even places, the
 * other those of odd ones. Vectors of channels are brought into this order by `arrange`. */
typedef struct { floats part[2]; } block;

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

INLINE floats load_lanes(const float *p) {
    floats value;
    memcpy(&value, p, sizeof value);
    return value;
}

INLINE block load_block(const void *p, int64_t i, int bf16) {
    if (!bf16) return (block){{load_lanes((const float *)p + i)}};
    words bits;
    memcpy(&bits, (const uint16_t *)p + i, sizeof bits);
    return (block){{(floats)(bits << 16), (floats)(bits & 0xffff0000)}};
}

/* The bits of fp32 after rounding to bf16, to nearest, ties to even. A NaN must not have set bits in its lower half,
 * which could carry over into the sign: see `arrange_map`. */
#define ROUNDED(bits) ((bits) + 0x7fff + ((bits) >> 16 & 1))

INLINE void store(void *p, int64_t i, float value, int bf16) {
    if (!bf16) { ((float *)p)[i] = value; return; }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t *)p)[i] = (uint16_t)(ROUNDED(bits) >> 16);
}

/* A `streamed` store is past the caches, which the rest of a large tensor would displace anyway: it saves reading what
 * is overwritten. */
INLINE void store_block(void *p, int64_t i, block value, int bf16, int streamed) {
    words first = (words)value.part[0], second = (words)value.part[1];
    floats packed = bf16 ? (floats)(ROUNDED(first) >> 16 | (ROUNDED(second) & 0xffff0000)) : value.part[0];
    void *at = (char *)p + i * (bf16 ? 2 : 4);
#if defined(__AVX__)
    if (streamed) { __builtin_ia32_movntps256(at, packed); return; }
#elif defined(__SSE2__)
    if (streamed) { __builtin_ia32_movntps(at, packed); return; }
#endif
    memcpy(at, &packed, sizeof packed);
}

INLINE int parts(input n) { return n.bf16 ? 2 : 1; }

/* The same of a vector of channels that is arranged. */
INLINE block load_channels(input n, const float *v) {
    return (block){{load_lanes(v), n.bf16 ? load_lanes(v + LANES) : (floats){0}}};
}

INLINE void add_to(input n, float *v, block terms) {
    for (int k = 0; k < parts(n); k++, v += LANES) {
        floats sum = load_lanes(v) + terms.part[k];
        memcpy(v, &sum, sizeof sum);
    }
}

INLINE block filled(float value) {
    floats lanes = value - (floats){0};
    return (block){{lanes, lanes}};
}

/* Brings a vector of `width` channels into the order of the blocks that are read of rows; the channels after the last
 * whole block are read one by one. */
INLINE void arrange(input n, int64_t width, float *v) {
    if (!n.bf16 || n.B > 1) return;
    for (float *end = v + width; v + 2 * LANES <= end; v += 2 * LANES) {
        float even[LANES], odd[LANES];
        for (int k = 0; k < LANES; k++) {
            even[k] = v[2 * k];
            odd[k] = v[2 * k + 1];
        }
        memcpy(v, even, sizeof even);
        memcpy(v + LANES, odd, sizeof odd);
    }
}

/* The inverse. */
INLINE void restore(input n, int64_t width, float *v) {
    if (!n.bf16 || n.B > 1) return;
    for (float *end = v + width; v + 2 * LANES <= end; v += 2 * LANES) {
        float channels[2 * LANES];
        for (int k = 0; k < LANES; k++) {
            channels[2 * k] = v[k];
            channels[2 * k + 1] = v[LANES + k];
        }
        memcpy(v, channels, sizeof channels);
    }
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

/* sums += g, products += g * d of one block, with d = x - shift, and g = dy, or d without a dy. */
INLINE void add_block(input n, int64_t i, block shift, floats *sums, floats *products) {
    block x = load_block(n.x, i, n.bf16), dy = n.graded ? load_block(n.dy, i, n.bf16) : x;
    for (int k = 0; k < parts(n); k++) {
        floats d = x.part[k] - shift.part[k], g = n.graded ? dy.part[k] : d;
        sums[k] += g;
        products[k] += g * d;
    }
}

/* The same of one value. */
INLINE void add_value(input n, int64_t i, float shift, float *sum, float *product) {
    float d = load(n.x, i, n.bf16) - shift, g = n.graded ? load(n.dy, i, n.bf16) : d;
    *sum += g;
    *product += g * d;
}

/* r += the sums of g, q += those of g * d of `rows` rows from `at` on: summed alone first, which rounds less. */
INLINE void sum_rows(input n, int64_t at, int rows, int64_t width, const float *shift, float *r, float *q) {
    int64_t c = 0, step = parts(n) * LANES;
    for (; c + step <= width; c += step) {
        block about = load_channels(n, shift + c), sum = filled(0), product = filled(0);
        for (int row = 0; row < rows; row++) add_block(n, at + row * n.C + c, about, sum.part, product.part);
        add_to(n, r + c, sum);
        add_to(n, q + c, product);
    }
    for (; c < width; c++) {
        float sum = 0, product = 0;
        for (int row = 0; row < rows; row++) add_value(n, at + row * n.C + c, shift[c], &sum, &product);
        r[c] += sum;
        q[c] += product;
    }
}

/* The same of `count` adjacent values of one channel. */
INLINE void sum_run(input n, int64_t at, int64_t count, float shift, float *r, float *q) {
    enum { CHAINS = 4 }; /* independent sums, because an addition takes several cycles */
    floats sums[CHAINS] = {{0}}, products[CHAINS] = {{0}};
    block about = filled(shift);
    int64_t i = at, end = at + count, step = parts(n) * LANES;
    for (; i + CHAINS * LANES <= end; i += CHAINS * LANES)
        for (int k = 0; k < CHAINS; k += parts(n)) add_block(n, i + k * LANES, about, sums + k, products + k);
    for (; i + step <= end; i += step) add_block(n, i, about, sums, products);
    floats sum_lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    floats product_lanes = (products[0] + products[1]) + (products[2] + products[3]);
    float sum = 0, product = 0;
    for (; i < end; i++) add_value(n, i, shift, &sum, &product);
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

/* The mean of a channel by a plain sum, which infinite values make infinite and not NaN, as torch's is. */
INLINE float plain_mean(input n, int64_t c) {
    double sum = 0;
    for (int64_t a = 0; a < n.A; a++)
        for (int64_t b = 0; b < n.B; b++) sum += load(n.x, (a * n.C + c) * n.B + b, n.bf16);
    return (float)(sum / (double)(n.A * n.B));
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
        restore(n, width, mean_out + c0);
        restore(n, width, invstd_out + c0);
        for (int64_t c = c0; c < c0 + width; c++)
            if (!isfinite(mean_out[c])) mean_out[c] = plain_mean(n, c);
    }
}

/* sum(dy) and sum(dy * (x - mean)). */
INLINE void reduce(input n, const float *mean, float *sum_dy, float *sum_dy_xmu) {
    for (int64_t c0 = 0; c0 < n.C; c0 += TILE) {
        int64_t width = min(n.C - c0, TILE), waiting = 0;
        float shift[TILE], r[TILE] = {0}, q[TILE] = {0};
        double sum[TILE] = {0}, product[TILE] = {0};
        span s = {0};
        memcpy(shift, mean + c0, width * sizeof(float));
        arrange(n, width, shift);
        int more = next_span(&s, n);
        while (more) {
            sum_span(n, s, c0, width, shift, r, q);
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
        restore(n, width, sum_dy + c0);
        restore(n, width, sum_dy_xmu + c0);
    }
}

/* out = slope * (x - mean) + shift, and dy_scale * dy on top of it. */
typedef struct {
    void *out;
    float mean[TILE], slope[TILE], shift[TILE], dy_scale[TILE];
} map;

#define MAPPED(graded, x, dy, mean, slope, shift, dy_scale) \
    ((graded) ? (slope) * ((x) - (mean)) + (shift) + (dy_scale) * (dy) : (slope) * ((x) - (mean)) + (shift))

/* One block of the output at `i`. */
INLINE void map_block(input n, void *out, int64_t i, block mean, block slope, block shift, block dy_scale,
                      int streamed) {
    block x = load_block(n.x, i, n.bf16), dy = n.graded ? load_block(n.dy, i, n.bf16) : x;
    for (int k = 0; k < parts(n); k++)
        x.part[k] = MAPPED(n.graded, x.part[k], dy.part[k], mean.part[k], slope.part[k], shift.part[k],
                           dy_scale.part[k]);
    store_block(out, i, x, n.bf16, streamed);
}

/* One value of channel `c` of the tile. */
INLINE void map_value(input n, const map *m, int64_t i, int64_t c) {
    float x = load(n.x, i, n.bf16), dy = n.graded ? load(n.dy, i, n.bf16) : 0, scale = n.graded ? m->dy_scale[c] : 0;
    store(m->out, i, MAPPED(n.graded, x, dy, m->mean[c], m->slope[c], m->shift[c], scale), n.bf16);
}

INLINE void map_row(input n, const map *m, int64_t at, int64_t width, int streamed) {
    int64_t c = 0, step = parts(n) * LANES;
    for (; c + step <= width; c += step) {
        block mean = load_channels(n, m->mean + c), slope = load_channels(n, m->slope + c);
        block shift = load_channels(n, m->shift + c), dy_scale = n.graded ? load_channels(n, m->dy_scale + c) : mean;
        map_block(n, m->out, at + c, mean, slope, shift, dy_scale, streamed);
    }
    for (; c < width; c++) map_value(n, m, at + c, c);
}

INLINE void map_run(input n, const map *m, int64_t at, int64_t c, int streamed) {
    block mean = filled(m->mean[c]), slope = filled(m->slope[c]), shift = filled(m->shift[c]);
    block dy_scale = filled(n.graded ? m->dy_scale[c] : 0);
    int64_t i = at, end = at + n.B, step = parts(n) * LANES;
    for (; i + step <= end; i += step) map_block(n, m->out, i, mean, slope, shift, dy_scale, streamed);
    for (; i < end; i++) map_value(n, m, i, c);
}

INLINE void map_all(input n, const map *m, int64_t c0, int64_t width, int streamed) {
    for (int64_t a = 0; a < n.A; a++) {
        if (n.B == 1) map_row(n, m, a * n.C + c0, width, streamed);
        else for (int64_t c = 0; c < width; c++) map_run(n, m, (a * n.C + c0 + c) * n.B, c, streamed);
    }
}

/* For bf16: the order of blocks, and a NaN for which ROUNDED is right. */
INLINE void arrange_map(input n, map *m, int64_t width) {
    float *vectors[] = {m->mean, m->slope, m->shift, m->dy_scale};
    for (int k = 0; n.bf16 && k < 3 + n.graded; k++) {
        float *v = vectors[k];
        for (int64_t c = 0; c < width; c++) v[c] = isnan(v[c]) ? NAN : v[c];
        arrange(n, width, v);
    }
}

/* Whether all blocks of the output are aligned, and it is large enough. */
INLINE int streams(input n, const map *m) {
    int64_t adjacent = n.B == 1 ? n.C : n.B;
    int aligned = adjacent % (parts(n) * LANES) == 0 && (uintptr_t)m->out % sizeof(floats) == 0;
    return aligned && n.A * n.C * n.B >= STREAMED;
}

INLINE void map_tile(input n, map *m, int64_t c0, int64_t width) {
    arrange_map(n, m, width);
    if (streams(n, m)) {
        map_all(n, m, c0, width, 1);
#if defined(__SSE2__)
        __builtin_ia32_sfence(); /* before anything that tells another thread of the output */
#endif
    } else {
        map_all(n, m, c0, width, 0);
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
        memcpy(m.mean, mean + c0, width * sizeof(float));
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
        memcpy(m.mean, mean + c0, width * sizeof(float));
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

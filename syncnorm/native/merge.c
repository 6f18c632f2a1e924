/* The statistics of the global batch from those of its W parts, and the running statistics.
 *
 * Every rank computes this from the same rows, and the results must have the same bits on all of them: so the file is
 * compiled for the plainest instruction set, without contraction to fused multiply-adds, and adds in rank order.
 *
 * Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979). */

#include <math.h>
#include <stdint.h>

enum { TILE = 256 };

/* What is known of running statistics; their mean is null if there are none. */
typedef struct {
    void *mean, *var;
    int64_t wide_mean, wide_var; /* whether they are fp64 and not fp32 */
    int64_t *tracked;            /* counts batches; may be null */
    double momentum;             /* negative for 1 / tracked */
} running_statistics;

/* running <- (1 - factor) * running + factor * value * scale, in fp64, as moments.py does; a factor of 1 gives exactly
 * the value. */
static void blend(void *running, int64_t wide, int64_t begin, const float *value, int64_t n, double scale,
                  double factor) {
    double *wides = (double *)running + begin;
    float *narrow = (float *)running + begin;
    for (int64_t i = 0; i < n; i++) {
        double old = wide ? wides[i] : narrow[i], target = value[i] * scale, step = target - old;
        double new = factor < 0.5 ? old + factor * step : target - (1 - factor) * step;
        if (wide) wides[i] = new;
        else narrow[i] = (float)new;
    }
}

/* moments: (W, 2C) with `stride` values between rows, the mean and the 1 / sqrt(biased variance + eps) of each part;
 * counts: (W) values per channel. mean, invstd and var: (C), written; var is biased and may be null. A part with count 0
 * has no weight, whatever its moments are; without any value mean and variance are 0 and `running` stays. */
void merge(const float *moments, int64_t stride, const int64_t *counts, int64_t W, int64_t C, double eps, float *mean,
           float *invstd, float *var, const running_statistics *running) {
    int64_t total = 0;
    for (int64_t w = 0; w < W; w++) total += counts[w];
    int tracks = running && running->mean && total > 0;
    double bessel = (double)total / (double)(total > 1 ? total - 1 : 1), factor = 0;
    if (tracks) {
        if (running->tracked) ++*running->tracked;
        factor = running->momentum < 0 ? 1.0 / (double)*running->tracked : running->momentum;
    }
    for (int64_t c0 = 0; c0 < C; c0 += TILE) {
        int64_t width = C - c0 < TILE ? C - c0 : TILE;
        double sum[TILE] = {0}, var_eps[TILE] = {0};
        float biased[TILE];
        for (int64_t w = 0; w < W; w++) {
            if (counts[w] == 0) continue;
            const float *means = moments + w * stride + c0;
            double share = (double)counts[w] / (double)total;
            for (int64_t c = 0; c < width; c++) sum[c] += means[c] * share;
        }
        for (int64_t w = 0; w < W; w++) {
            if (counts[w] == 0) continue;
            const float *means = moments + w * stride + c0, *invstds = means + C;
            double share = (double)counts[w] / (double)total;
            for (int64_t c = 0; c < width; c++) {
                double distance = means[c] - sum[c], s = invstds[c];
                var_eps[c] += (1 / (s * s) + distance * distance) * share;
            }
        }
        for (int64_t c = 0; c < width; c++) {
            /* A rounded invstd turns a variance of 0 into +-1e-7 * eps. */
            float rounded = (float)(var_eps[c] < eps ? eps : var_eps[c]);
            mean[c0 + c] = (float)sum[c];
            invstd[c0 + c] = 1 / sqrtf(rounded);
            biased[c] = rounded - (float)eps;
            if (var) var[c0 + c] = biased[c];
        }
        if (tracks) {
            blend(running->mean, running->wide_mean, c0, mean + c0, width, 1, factor);
            blend(running->var, running->wide_var, c0, biased, width, bessel, factor);
        }
    }
}

/* sums: (n), the sum of W rows with `stride` values between them, in rank order. */
void sum_rows(const float *rows, int64_t stride, int64_t W, int64_t n, float *sums) {
    for (int64_t i = 0; i < n; i++) sums[i] = rows[i];
    for (int64_t w = 1; w < W; w++)
        for (int64_t i = 0; i < n; i++) sums[i] += rows[w * stride + i];
}

/* The gradients of bias and weight from one rank's sum_dy and sum_dy_xmu, (2, C). */
void parameter_gradients(const float *sums, const float *invstd, int64_t C, float *d_bias, float *d_weight) {
    for (int64_t c = 0; c < C; c++) {
        d_bias[c] = sums[c];
        d_weight[c] = sums[C + c] * invstd[c];
    }
}

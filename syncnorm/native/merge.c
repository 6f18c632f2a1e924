/* The statistics of the global batch from those of its W parts, and the running statistics.
 *
 * Every rank computes this from the same rows, and the results must have the same bits on all of them: so the file is
 * compiled for the plainest instruction set, without contraction to fused multiply-adds, and adds in rank order.
 *
 * Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979). */

#include <math.h>
#include <stdint.h>

enum { TILE = 256 };

/* moments: (W, 2C), the mean and the 1 / sqrt(biased variance + eps) of each part; counts: (W) values per channel.
 * mean, invstd and var: (C), written; var is biased. A part with count 0 has no weight; without any value mean and
 * variance are 0. */
void merge(const float *moments, const int64_t *counts, int64_t W, int64_t C, double eps, float *mean, float *invstd,
           float *var) {
    int64_t total = 0;
    for (int64_t w = 0; w < W; w++) total += counts[w];
    for (int64_t c0 = 0; c0 < C; c0 += TILE) {
        int64_t width = C - c0 < TILE ? C - c0 : TILE;
        double sum[TILE] = {0}, var_eps[TILE] = {0};
        for (int64_t w = 0; w < W; w++) {
            const float *means = moments + w * 2 * C + c0;
            double share = (double)counts[w] / (double)(total > 0 ? total : 1);
            for (int64_t c = 0; c < width; c++) sum[c] += means[c] * share;
        }
        for (int64_t w = 0; w < W; w++) {
            const float *means = moments + w * 2 * C + c0, *invstds = means + C;
            double share = (double)counts[w] / (double)(total > 0 ? total : 1);
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
            var[c0 + c] = rounded - (float)eps;
        }
    }
}

/* running <- (1 - factor) * running + factor * scale * value, in fp64; `running` is fp64 if `wide` is set, else fp32. */
static void blend(void *running, int wide, const float *value, int64_t C, double scale, double factor) {
    double *wides = running;
    float *narrow = running;
    for (int64_t c = 0; c < C; c++) {
        double old = wide ? wides[c] : narrow[c], blended = old + factor * (value[c] * scale - old);
        if (wide) wides[c] = blended;
        else narrow[c] = (float)blended;
    }
}

/* The running statistics with those of a batch; bessel is N / (N - 1), which makes the variance unbiased. */
void update_running(void *running_mean, void *running_var, int wide, const float *mean, const float *var, int64_t C,
                    double bessel, double factor) {
    blend(running_mean, wide, mean, C, 1, factor);
    blend(running_var, wide, var, C, bessel, factor);
}

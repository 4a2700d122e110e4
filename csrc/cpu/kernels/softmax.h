#pragma once

// From scores to results: logits, the running maximum and sum of the online softmax (Milakov and Gimelshein,
// arXiv:1805.02867), the merging of parts, and the division at the end.
#include <algorithm>

#include "cpu/kernels/pack.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// How scores (products of queries and keys) become logits. Scores that are only scaled, by a positive number, stay as
/// they are: the row's maximum is subtracted first and the difference scaled, so that the weight of the largest is
/// exactly 1 however large the logits are. Others are prepared: they become logits before the maximum is taken.
struct LogitRule {
  LogitRule(double scale, double softcap)
      : scale(scale),
        softcap(softcap),
        is_capped(softcap > 0.0),
        is_wide(!suits_float(scale) || !suits_float(softcap) || (is_capped && !suits_float(scale / softcap))),
        is_prepared(is_capped || is_wide || !(scale > 0.0)),
        unit(is_prepared ? 1.0f : static_cast<float>(scale)),
        factor(static_cast<float>(unit * 1.4426950408889634)) {}

  double scale, softcap;
  bool is_capped;
  bool is_wide;  // the numbers, or products with them, may not fit in float: double is used, at its cost
  bool is_prepared;
  float unit;    // logit = unit * score, where the score is prepared if it has to be
  float factor;  // the same in units of log2

  /// Prepares the scores of whole vectors; where slopes are given, also the derivative of the cap, 1 - tanh^2.
  void prepare(float* score, Span columns, float* slope = nullptr) const {
    if (is_wide) return prepare_wide(score, columns, slope);
    if (!is_capped) {
      for (int64_t i = columns.first; i < columns.end; i += kLanes) {
        (load(score + i) * Vec(static_cast<float>(scale))).store(score + i);
      }
      return;
    }
    const Vec inner(static_cast<float>(scale / softcap)), outer(static_cast<float>(softcap));
    for (int64_t i = columns.first; i < columns.end; i += kLanes) {
      const Vec tanh = (load(score + i) * inner).tanh();
      (tanh * outer).store(score + i);
      if (slope) (Vec(1.0f) - tanh * tanh).store(slope + i);
    }
  }

 private:
  /// Whether products with a number are as good in float as they are with 1.
  static bool suits_float(double x) { return x == 0.0 || (1e-30 <= std::abs(x) && std::abs(x) <= 1e30); }

  void prepare_wide(float* score, Span columns, float* slope) const {
    for (int64_t i = columns.first; i < columns.end; ++i) {
      const double logit = score[i] * scale;
      const double tanh = is_capped ? std::tanh(logit / softcap) : 0.0;
      score[i] = static_cast<float>(is_capped ? softcap * tanh : logit);
      if (slope) slope[i] = static_cast<float>(1.0 - tanh * tanh);
    }
  }
};

inline void store_operand(const Vec& x, float* dst) { x.store(dst); }
#if defined(__AVX512BF16__)
inline void store_operand(const Vec& x, c10::BFloat16* dst) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

/// What some rows have seen of their keys: the largest score, the sum of the weights relative to it, and the values
/// summed up with those weights.
struct SoftmaxRows {
  float* out;        // (rows, columns); undefined where max is -inf
  float *max, *sum;  // (rows,)
  int64_t columns;

  static int64_t floats(int64_t rows, int64_t columns) { return rows * (columns + 2); }
  /// In memory of floats(rows, columns).
  static SoftmaxRows in(float* memory, int64_t rows, int64_t columns) {
    return {memory, memory + rows * columns, memory + rows * (columns + 1), columns};
  }

  float* out_of(int64_t row) const { return out + row * columns; }

  /// As before the first key.
  void start(int64_t rows) const {
    std::fill_n(max, rows, -kInfinity);
    std::fill_n(sum, rows, 0.0f);
  }

  void copy_to(const SoftmaxRows& to, int64_t rows) const {
    std::copy_n(out, rows * columns, to.out);
    std::copy_n(max, rows, to.max);
    std::copy_n(sum, rows, to.sum);
  }

  /// The scores of `span`, whole vectors of the first `count` ones, become weights relative to the row's new maximum,
  /// those outside of it zeros. What was summed up before is rescaled to it.
  template <typename E>
  void add(const LogitRule& rule, int64_t row, Span span, int64_t count, const float* score, E* weight) const {
    Vec r_max(-kInfinity);
    for (int64_t i = span.first; i < span.end; i += kLanes) r_max = larger(r_max, load(score + i));
    float new_max = std::max(largest(r_max), max[row]);  // in this order, NaN wins
    if (new_max == -kInfinity) {
      if (std::none_of(score + span.first, score + span.end, [](float x) { return x != x; })) {
        std::fill_n(weight, count, E(0.0f));
        return;
      }
      new_max = kNaN;  // lost by `larger`, which beside a number only costs a weight
    }
    if (new_max != max[row] && max[row] != -kInfinity) {
      const float decay = std::exp2((max[row] - new_max) * rule.factor);
      sum[row] *= decay;
      float* row_out = out_of(row);
      for (int64_t i = 0; i < columns; i += kLanes) (load(row_out + i) * Vec(decay)).store(row_out + i);
    }
    max[row] = new_max;
    const Vec factor(rule.factor), r_new_max(new_max);
    Vec r_sum(0.0f);
    std::fill_n(weight, span.first, E(0.0f));
    for (int64_t i = span.first; i < span.end; i += kLanes) {
      const Vec r_weight = exp2((load(score + i) - r_new_max) * factor);
      r_sum = r_sum + r_weight;
      store_operand(r_weight, weight + i);
    }
    std::fill(weight + span.end, weight + count, E(0.0f));
    sum[row] += selfattn::cpu::sum(r_sum);
  }

  /// A row becomes that of the parts, each `stride` floats after the one before.
  void merge(const LogitRule& rule, int64_t row, const SoftmaxRows& first_part, int64_t stride, int64_t parts) const {
    const float *maxima = first_part.max + row, *sums = first_part.sum + row;
    max[row] = -kInfinity, sum[row] = 0.0f;
    for (int64_t part = 0; part < parts; ++part) max[row] = std::max(max[row], maxima[part * stride]);
    float* row_out = out_of(row);
    std::fill_n(row_out, columns, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      if (maxima[part * stride] == -kInfinity) continue;
      const float decay = std::exp2((maxima[part * stride] - max[row]) * rule.factor);  // NaN of a NaN
      sum[row] += decay * sums[part * stride];
      const float* part_out = first_part.out_of(row) + part * stride;
      for (int64_t i = 0; i < columns; i += kLanes) {
        at::vec::fmadd(load(part_out + i), Vec(decay), load(row_out + i)).store(row_out + i);
      }
    }
  }

  /// Divides a row by its sum: its result, of `value_dim` elements, and its lse. A sink (or null) takes part in the sum
  /// only.
  template <typename T>
  void finish(const LogitRule& rule, int64_t row, const float* row_sink, T* result, int64_t value_dim,
              float& lse) const {
    const float sink = row_sink ? *row_sink : -kInfinity;
    // The sink minus the largest logit, rounded once: the logit itself would be rounded at its own size.
    const float sink_above = row_sink ? std::fma(-max[row], rule.unit, sink) : -kInfinity;
    const bool is_sink_above = sink_above > 0.0f;
    const float decay = is_sink_above ? std::exp(-sink_above) : 1.0f;
    const float total = is_sink_above ? sum[row] * decay + 1.0f : sum[row] + std::exp(sink_above);
    lse = is_sink_above ? sink + std::log(total) : std::fma(max[row], rule.unit, std::log(total));
    if (lse == kInfinity && sink != kInfinity) lse = kNaN;  // a logit too large for float is an infinite one
    if (sum[row] == 0.0f || std::isinf(lse)) {              // no key, or none with a weight
      lse = sink;
      std::fill_n(result, value_dim, T(0.0f));
    } else {
      convert_scaled(out_of(row), lse == lse ? decay / total : kNaN, result, value_dim);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu

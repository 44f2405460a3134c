// The maths of one row of logits z (C,), for any target distribution q >= 0 with total Q = Σ q:
//
//   loss       Σ_c q_c (lse - z_c)                      lse = log Σ exp z,  p = softmax(z)
//   gradient   Q p - q
//   Hessian·v  Q (p∘v - p (p·v))
//   third·u·v  Q p∘(u∘v - Σ p u v - (p·v)(u - p·u) - (p·u)(v - p·v))
//
// Class weights and label smoothing only choose q:  q_c = Γ_c ((1 - ε) [c = y] + ε / C).
//
// Of a row that the model is sure of, 1 - p is nothing once p has been rounded to 1: a float32 row would have
// no gradient and a curvature of the wrong size or sign. So nothing is subtracted from 1. With e = exp(z -
// max) and m a class that attains the maximum,
//   log Σ e          = log(1 + (Σ_{c≠y} e_c + (e_y - 1)))
//   gradient at y    = Σ_{c≠y} q_c - Q Σ_{c≠y} p_c
//   along u, v       as above for u - u_m, v - v_m, which are 0 where p may be 1
#pragma once

#include <cmath>
#include <cstdint>

#include "oscillation.h"

namespace dynloss {

// Σ e in two parts, e = exp(z - max).
template <typename T>
struct RowSum {
  T label;   // e_y
  T others;  // Σ_{c≠y} e_c

  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER T all() const { return label + others; }
  // all() - 1. Where e_y < 1 one of the others is 1, and there is no harm in the rounding.
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER T rest() const { return others + (label - 1.0f); }
};

// log(1 + rest): the logarithm of the rounded sum, and what its rounding has lost where that counts. Takes a
// third of the time of log1p.
template <typename T>
DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE T log_of_sum(T rest) {
  const T sum = 1 + rest;
  return std::log(sum) + (rest < 1 ? rest - (sum - 1) : T(0));
}

// The loss of a row from log Σ e and linear = Σ q_c (z_c - max).
template <typename T>
DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE T row_loss(T total, T log_sum, T linear) {
  return total * log_sum - linear;
}

// q of one row, without storing C numbers: q_c = on_label·[c = y] + spread·Γ_c.
template <typename T>
struct TargetWeights {
  T on_label;   // (1 - ε) Γ_y
  T spread;     // ε / C
  T elsewhere;  // Σ_{c≠y} q_c
  T total;      // Q

  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER T loss(const RowSum<T>& sum, T linear) const {
    return row_loss(total, log_of_sum(sum.rest()), linear);
  }
};

// What the rows of a block share, so that one row costs no float64 arithmetic.
template <typename T>
struct SharedTargetWeights {
  T keep;    // 1 - ε
  T spread;  // ε / C
  T common;  // ε / C · Σ Γ

  DYNLOSS_HOST_DEVICE SharedTargetWeights(double gamma_sum, double smoothing, int64_t num_classes)
      : keep(static_cast<T>(1.0 - smoothing)),
        spread(static_cast<T>(smoothing / static_cast<double>(num_classes))),
        common(static_cast<T>(gamma_sum) * spread) {}

  // Of one row in numbers, or of several in vectors of lanes.
  template <typename G>
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER TargetWeights<G> at(G gamma_label) const {
    const G on_label = keep * gamma_label;
    return {on_label, spread + G{}, common - spread * gamma_label, on_label + common};
  }
};

// scale · (Q p - q), given the sums of e: element by element of_softmax(e), less of_smoothing(Γ_c) where
// labels are smoothed; at the label at_label. Of one row in numbers, or of several in vectors of lanes;
// elements may be vectors where the rest is numbers.
template <typename T>
struct RowGradient {
  T factor;  // scale·Q / Σ e
  T spread;  // scale·ε / C
  T at_label;

  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER RowGradient(T scale, const TargetWeights<T>& q,
                                                               const RowSum<T>& sum)
      : factor(scale * q.total / sum.all()),
        spread(scale * q.spread),
        at_label(scale * q.elsewhere - factor * sum.others) {}

  template <typename E>
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER E of_softmax(E e) const {
    return e * factor;
  }
  template <typename G>
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER auto of_smoothing(G gamma) const {
    return spread * gamma;
  }
};

// Running maximum and Σ exp(z - maximum) of a part of a row; parts are brought to a common maximum and summed
// in any order. A part that is empty or all -inf so far has sum 0: -inf - -inf must not make it NaN. A row
// that is -inf as a whole ends with sum 0, and 0/0 makes it NaN as it should be.
template <typename T>
struct MaxSum {
  T max;
  T sum;

  DYNLOSS_HOST_DEVICE static MaxSum empty() { return {-static_cast<T>(INFINITY), T(0)}; }

  // The sum in terms of a larger maximum.
  DYNLOSS_HOST_DEVICE T sum_at(T top) const { return max == top ? sum : sum * std::exp(max - top); }

  // `exp`: of numbers that are at most 0.
  template <int n, typename Exp>
  DYNLOSS_HOST_DEVICE void add(const T (&z)[n], Exp&& exp) {
    T top = max;
    for (int i = 0; i < n; ++i) top = z[i] > top ? z[i] : top;
    sum = sum_at(top);
    max = top;
    const T base = top == -static_cast<T>(INFINITY) ? T(0) : top;
    for (int i = 0; i < n; ++i) sum += exp(z[i] - base);
  }
};

// p∘f is what each derivative multiplies by Q; these are f for one class, given the row's inner products.
// T may be a vector of lanes, whose type must not cross a call between functions for different instruction
// sets.
template <typename T>
DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE T hessian_factor(T v, T pv) {
  return v - pv;
}

template <typename T>
DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE T third_factor(T u, T v, T pu, T pv, T puv) {
  return u * v - puv - pv * (u - pu) - pu * (v - pv);
}

// Σ p v, Σ p u and Σ p u v, over a part of a row before they are divided by the sum of e, for directions
// relative to their values at a class that attains the maximum. Members by name and not an array: in memory
// they would cost a tenth of a long row's Hessian·v.
template <typename T>
struct InnerProducts {
  T v_top = {}, u_top = {};
  T pv = {}, pu = {}, puv = {};

  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER void add(T e, T v) { pv += e * (v - v_top); }
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER void add(T e, T u, T v) {
    const T weighted = e * (v - v_top);
    pv += weighted;
    pu += e * (u - u_top);
    puv += weighted * (u - u_top);
  }
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER void divide(T sum) {
    pv /= sum;
    pu /= sum;
    puv /= sum;
  }
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER T factor(T v) const {
    return hessian_factor(v - v_top, pv);
  }
  DYNLOSS_HOST_DEVICE DYNLOSS_ALWAYS_INLINE_MEMBER T factor(T u, T v) const {
    return third_factor(u - u_top, v - v_top, pu, pv, puv);
  }
};

}  // namespace dynloss

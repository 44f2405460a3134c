// Γ(step): the class weights of the dynamical loss (Ruiz-Garcia, Zhang, Schoenholz, Liu, ICML 2021).
//
// One class is raised at a time. The turn of class i lasts `turn` steps; t steps into it the raw weight of
// that class is g(t), between 1 and the amplitude A, and the others weigh 1. Γ = C·g / Σg, so ΣΓ = C. Phases
// are exact for all steps: of whole numbers, and of the rational number that a float64 turn is. They are
// rounded where t itself has more than 53 bits.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DYNLOSS_HOST_DEVICE __host__ __device__
#else
#define DYNLOSS_HOST_DEVICE
#endif
#define DYNLOSS_ALWAYS_INLINE inline __attribute__((always_inline))
#define DYNLOSS_ALWAYS_INLINE_MEMBER __attribute__((always_inline))

namespace dynloss {

enum class Waveform : int { triangle = 0, sine = 1, square = 2 };

// One row of the `clock` tensor, column by column, all float64 (exact for every step below 2^53).
struct Clock {
  double amplitude;   // A >= 1
  double period;      // T > 0, in steps
  double turn;        // steps until the next class is raised: T, or T + 1 for closed turns
  double start_step;  // Γ = 1 before
  double stop_step;   // Γ = 1 from here on; +inf for never
  double waveform;    // a Waveform
};
constexpr int64_t clock_columns = 6;
static_assert(sizeof(Clock) == clock_columns * sizeof(double), "Clock mirrors a row of the clock tensor");

// Γ of one step: a row of a table, or two values and the class that has the first.
struct ClassWeights {
  const double* table_row;  // (C,) or null
  int64_t active;
  double raised;
  double rest;

  DYNLOSS_HOST_DEVICE double operator[](int64_t class_index) const {
    if (table_row != nullptr) return table_row[class_index];
    return class_index == active ? raised : rest;
  }
};

// What evaluates to Γ at a step; the pointers may be null.
struct Schedule {
  const Clock* clock;
  const int64_t* class_order;  // (C,): the class raised in turn 0, 1, ...
  const double* table;         // (S, C): row (step - start) mod S, instead of a waveform
  int64_t table_rows;
  int64_t num_classes;
};

// sin(π x); CUDA's own needs no reduction of large arguments, which would cost every kernel a stack frame.
DYNLOSS_HOST_DEVICE inline double sin_pi(double x) {
#if defined(__CUDA_ARCH__)
  return sinpi(x);
#else
  return sin(3.14159265358979323846 * x);
#endif
}

// g(t) of the raised class, t in [0, turn).
DYNLOSS_HOST_DEVICE inline double raw_weight(const Clock& clock, double t) {
  const double rise = clock.amplitude - 1.0;
  switch (static_cast<Waveform>(static_cast<int>(clock.waveform))) {
    case Waveform::square:
      return clock.amplitude;
    case Waveform::sine:
      return 1.0 + rise * sin_pi(t / clock.period);
    default:
      return t < clock.period / 2 ? 1.0 + 2.0 * rise * t / clock.period
                                  : 2.0 * clock.amplitude - 1.0 - 2.0 * rise * t / clock.period;
  }
}

constexpr double whole_numbers_end = 9007199254740992.0;  // 2^53, of a double

// elapsed = turns·turn + t with 0 <= t < turn, t exactly as fmod gives it, which takes a loop: a quotient
// below 2^53 is one off at most, and then the remainder of the next one is as exact.
DYNLOSS_HOST_DEVICE inline double split_turns(double elapsed, double turn, double* turns) {
  double quotient = floor(elapsed / turn);
  double t = quotient == 0.0 ? elapsed : fma(-quotient, turn, elapsed);  // a turn may be infinite
  if (t < 0.0 || t >= turn) {
    quotient += t < 0.0 ? -1.0 : 1.0;
    t = fma(-quotient, turn, elapsed);
  }
  *turns = quotient;
  return t;
}

// turns·turn + t steps, as far as Γ depends on them.
struct Phase {
  int64_t place;  // turns mod C
  double t;
};

// Exact: no sum or difference has more bits than `turn`.
DYNLOSS_HOST_DEVICE inline Phase sum_of_phases(const Phase& a, const Phase& b, double turn, int64_t classes) {
  const bool next = a.t >= turn - b.t;
  return {(a.place + b.place + next) % classes, next ? a.t - (turn - b.t) : a.t + b.t};
}

DYNLOSS_HOST_DEVICE inline Phase phase_of(double elapsed, double turn, int64_t classes) {
  double turns = 0.0, rounds = 0.0;
  const double t = split_turns(elapsed, turn, &turns);
  return {static_cast<int64_t>(split_turns(turns, static_cast<double>(classes), &rounds)), t};
}

// The same where a double does not hold the steps or the turns.
DYNLOSS_HOST_DEVICE inline Phase far_phase(uint64_t elapsed, double turn, int64_t classes) {
  if (turn >= 18446744073709551616.0) return {0, static_cast<double>(elapsed)};  // 2^64
  if (turn == floor(turn)) {
    const auto whole = static_cast<uint64_t>(turn);
    return {static_cast<int64_t>(elapsed / whole % static_cast<uint64_t>(classes)),
            static_cast<double>(elapsed % whole)};
  }
  const Phase one = phase_of(1.0, turn, classes);
  Phase sum = {0, 0.0};
  for (int bit = 63; bit >= 0; --bit) {
    sum = sum_of_phases(sum, sum, turn, classes);
    if (elapsed >> bit & 1) sum = sum_of_phases(sum, one, turn, classes);
  }
  return sum;
}

DYNLOSS_HOST_DEVICE inline ClassWeights weights_at(const Schedule& schedule, int64_t step) {
  const Clock& clock = *schedule.clock;
  // As whole numbers, which hold the steps that a double cannot tell apart, and those that are more than
  // 2^63.
  const auto start = static_cast<int64_t>(clock.start_step);
  const bool stopped = clock.stop_step < INFINITY && step >= static_cast<int64_t>(clock.stop_step);
  if (step < start || stopped) return {nullptr, 0, 1.0, 1.0};
  const uint64_t elapsed = static_cast<uint64_t>(step) - static_cast<uint64_t>(start);
  if (schedule.table != nullptr) {
    const uint64_t row = elapsed % static_cast<uint64_t>(schedule.table_rows);
    return {schedule.table + row * schedule.num_classes, 0, 1.0, 1.0};
  }
  const double steps = static_cast<double>(elapsed), classes = static_cast<double>(schedule.num_classes);
  const bool near = steps < whole_numbers_end && steps / clock.turn < whole_numbers_end;
  const Phase phase = near ? phase_of(steps, clock.turn, schedule.num_classes)
                           : far_phase(elapsed, clock.turn, schedule.num_classes);
  int64_t active = phase.place;
  if (schedule.class_order != nullptr) active = schedule.class_order[active];
  const double g = raw_weight(clock, phase.t);
  const double rest = classes / (classes - 1.0 + g);
  return {nullptr, active, g * rest, rest};
}

}  // namespace dynloss

// Every op of the library. Kernels register themselves under cpu/, cuda/, meta/ and autograd/ in the file
// named after the op.
//
// Shapes. A single problem has logits (C,), (N, C) or (N, C, d1, ...) and target (), (N,) or (N, d1, ...).
// An ensemble of E problems has logits (E, N, C) and target (E, N) or (N,), shared; it is told by a clock
// (or, in the derivatives, weights) with a leading dimension E. Below, [E] stands for that leading dimension.
//
//   clock        [E,] 6, float64: amplitude, period, turn, start, stop, waveform (csrc/core/oscillation.h)
//   step         added to step_tensor, int64 () or (E,), if that is given
//   class_order  (C,) int64: the class raised in each turn
//   table        [E,] S, C, float64: user-given class weights, repeated, in place of the waveform
//   weight       [E,] C, any floating-point dtype: multiplies Γ(step), class by class
//   weights      [E,] C, float64: Γ(step), times weight
//   normalizer   [E,] 2, float64: what the loss, and what `gradient`, has been divided by. They differ only
//   where
//                a one-pass kernel learns of ignored rows when the gradient is already written, and in
//                float16, which could not hold it; rescale_ mends that.
//   finished     both are the same: the gradient is not to be rescaled
//   reduction    0 none, 1 mean, 2 sum;   by_weights: a mean over Σ weights_y instead of the number of
//   samples
//
// The perceptrons are M networks of one hidden layer, hidden = act(x @ w1 + b1), logits = hidden @ w2 + b2:
//
//   parameters   M, P, float32 or float64: w1 (D, H), b1 (H,), w2 (H, C), b2 (C,), one after the other
//   inputs       [M,] N, D;   target   [M,] N, int64
//   hidden       H;   activation   0 relu, 1 tanh
//   loss         the mean over the N samples, weighted by Γ(step)
#include <torch/library.h>

#define DYNLOSS_AFTER_LOGITS                                                                       \
  ", Tensor target, SymInt step, Tensor? step_tensor, Tensor clock, Tensor? class_order, Tensor? " \
  "table, Tensor? weight, int reduction, bool by_weights, SymInt ignore_index, float label_smoothing"

#define DYNLOSS_PERCEPTRON                                                                                  \
  " parameters, Tensor inputs, Tensor target, int hidden, int activation, int step, Tensor clock, Tensor? " \
  "class_order, Tensor? table"

TORCH_LIBRARY(dynloss, library) {
  // Γ at every step of steps (S,) -> (S, [E,] C), float64.
  library.def(
      "oscillation_weights(Tensor steps, Tensor clock, Tensor? class_order, Tensor? table, SymInt "
      "num_classes) "
      "-> Tensor");

  // x, from the CPU, on the device of `like`, while that device's current stream captures. CUDA only.
  library.def("place(Tensor x, Tensor like) -> Tensor");

  // The loss: () or (E,) reduced, else of target's shape. Differentiable in logits; the other outputs are
  // constants.
  library.def("cross_entropy(Tensor logits" DYNLOSS_AFTER_LOGITS
              ") -> (Tensor loss, Tensor weights, Tensor normalizer)");

  // The same and the gradient of the (summed) loss in one pass. Not differentiable.
  library.def("cross_entropy_with_gradient(Tensor logits" DYNLOSS_AFTER_LOGITS
              ", bool finished) -> (Tensor loss, Tensor gradient, Tensor weights, Tensor normalizer)");

  // The same with the gradient written over the logits.
  library.def("cross_entropy_into_logits(Tensor(a!) logits" DYNLOSS_AFTER_LOGITS
              ") -> (Tensor loss, Tensor weights, Tensor normalizer)");

  // gradient *= grad_output · normalizer[1] / normalizer[0], untouched where that is exactly 1.
  library.def("rescale_(Tensor(a!) gradient, Tensor grad_output, Tensor normalizer) -> ()");

  // A derivative of Σ grad_output · loss in logits, shaped like them: the gradient; along one direction
  // Hessian·v; along two third·u·v. Differentiable in the directions, grad_output and (but for the last)
  // logits.
  library.def(
      "cross_entropy_derivative(Tensor? u, Tensor? v, Tensor grad_output, Tensor logits, Tensor target, "
      "Tensor weights, Tensor normalizer, SymInt ignore_index, float label_smoothing) -> Tensor");

  // The loss (M,), float64, and its gradient (M, P). Not differentiable.
  library.def("perceptron_gradient(Tensor" DYNLOSS_PERCEPTRON ") -> (Tensor loss, Tensor gradient)");

  // The product (M, P) of the Hessian of each member's loss with its row of v. Not differentiable.
  library.def("perceptron_hvp(Tensor" DYNLOSS_PERCEPTRON ", Tensor v) -> Tensor");

  // num_steps steps of gradient descent in place, from the parameters after `step` updates; velocity and
  // momentum as torch.optim.SGD has them. A member whose next parameters are not finite keeps the last finite
  // ones, and is marked in `finite`; one that is marked already is left alone. Records (S, M, 3), float64:
  // weighted loss, plain loss and accuracy after each update u with u % record_every == 0, at the weights
  // Γ(u + 1); NaN for members that are not finite.
  library.def("perceptron_train_(Tensor(a!)" DYNLOSS_PERCEPTRON
              ", Tensor(b!)? velocity, Tensor(c!) finite, Tensor learning_rate, Tensor? momentum, int "
              "num_steps, int record_every) -> Tensor");
}

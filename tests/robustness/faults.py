"""The single faults that robustness.mutate puts into csrc, and the tests that have to notice each."""

from __future__ import annotations

from typing import NamedTuple

AUTOGRAD = (
    "cross_entropy_autograd cross_entropy_graph cross_entropy cross_entropy_module cross_entropy_training"
    " cross_entropy_weight eager inplace_gradient"
)
LOSS = "cross_entropy cross_entropy_probabilities cross_entropy_weight oscillation confident_rows"
LANCZOS = "eigsh audits symmetry tracker spectrum operators"
PERCEPTRON = "perceptron perceptron_ensemble"


class Fault(NamedTuple):
    """A text that is in a file once, by what it is replaced, and the tests that have to notice, in tests/test_*.py."""

    file: str
    text: str
    by: str
    tests: str

    @property
    def name(self) -> tuple[str, str]:
        """As outcomes have it."""
        return self.file, f"{self.text} -> {self.by}"


def _faults(file: str, tests: str, *edits: tuple[str, str]) -> list[Fault]:
    return [Fault(file, text, by, tests) for text, by in edits]


FAULTS = [
    *_faults(
        "autograd/cross_entropy.cpp",
        AUTOGRAD,
        ("divided_by / divisor);", "divisor / divided_by);"),
        ("at::where(divisor == 0, at::ones_like(divisor)", "at::where(divisor == 1, at::ones_like(divisor)"),
        ("if (factor.dim() == 1) factor", "if (factor.dim() == 3) factor"),
        ("gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat", "gradient.scalar_type()"),
        ("return one && divisors[0] == divisors[1];", "return one;"),
        ("return one && divisors[0]", "return divisors[0]"),
        ("if (!has_gradient_ || !constant) return", "if (!has_gradient_) return"),
        ("!tangent_of(grad_output).defined();\n    if", "true;\n    if"),
        ("if (!keep) gradient_.reset_data();", "gradient_.reset_data();"),
        ("if (keep || saved.use_count() > 1 ||", "if (keep ||"),
        ("logits.scalar_type() != at::kHalf;", "true;"),
        ("tangent_of(*weight).defined()),", "false),"),
        ("torch::autograd::impl::bump_version(logits);", ""),
        ("directions[i] = by;", "directions[0] = by;"),
        ("derivative(x, directions, at::ones_like(grad_output))", "derivative(x, directions, grad_output)"),
        ("if (task_should_compute_output(count + 1))", "if (false)"),
        ("result[count + 1] = derivative(x, with_direction(w, directions), grad_output);", "result[count + 1] = w;"),
        ("directions.size() < 2", "directions.size() < 3"),
        ("add(replaced(directions, i, t), grad_output)", "add(replaced(directions, i, t), at::ones_like(grad_output))"),
        ("add(with_direction(t, directions), grad_output);", ";"),
        ("at::sum(product, {ensemble ? 2 : 1}", "at::sum(product, {1}"),
        ("!in_transform() && !tangent_of(logits).defined() && !at::isTensorSubclassLike(logits),", "true,"),
    ),
    *_faults(
        "lanczos/eigsh.cpp",
        LANCZOS,
        ("kMissProbability = 0.08", "kMissProbability = 0.8"),
        ("kInconclusive = 0.5", "kInconclusive = 2.0"),
        ("kMaxAuditProducts = 24", "kMaxAuditProducts = 1"),
        ("if (side * *found <= side * bound) return;", "return;"),
        ("std::pow(epsilon_, 2.0 / 3.0) * scale_", "0.0 * scale_"),
        ("deceived_ = beyond() > before ? 0 : deceived_ + 1;", "deceived_ = 0;"),
        ("if (symmetry_.fails(", "if (false && symmetry_.fails("),
        ("(!options_.audit || audited_) &&", "true &&"),
        ("return ritz_.values[a] > ritz_.values[b]; });", "return false; });"),
        ("residual_norms_[pair] / basis_.unit();", "residual_norms_[pair];"),
    ),
    *_faults(
        "lanczos/start_vectors.cpp",
        LANCZOS,
        ("if (overlap < 0.0) std::transform", "if (false) std::transform"),
        ("taken[from] = true;", ""),
    ),
    *_faults(
        "lanczos/symmetry.cpp",
        LANCZOS,
        ("kMaxProducts = 4", "kMaxProducts = 0"),
        ("if (!op.is_differentiated()) negligible_", "negligible_"),
    ),
    *_faults(
        "lanczos/complement_probe.cpp",
        LANCZOS,
        ("for (double& entry : coupling) entry = -entry;", ""),
        ("off_diagonal_.push_back(ends ? 0.0 : length);", "off_diagonal_.push_back(length);"),
    ),
    *_faults(
        "layout.cpp",
        f"{LOSS} cross_entropy_autograd",
        ("x.size(d) == 1) continue;", "false) continue;"),
        ("return stride ? stride : single;", "return single;"),
        ("table() + member * table_rows() * classes_;", "table() + member * classes_;"),
    ),
    *_faults(
        "cpu/cross_entropy.cpp",
        LOSS,
        ("if (e == 0 || own_labels) {", "if (e == 0) {"),
        ("sum / normalizer[2 * e];", "sum / normalizer[0];"),
        ("index > 0 && weights[index] == weights[index - 1]", "index > 0"),
        ("std::min(first + chunk, layout.rows)", "first + chunk"),
        ("return ignored > 0;", "return false;"),
    ),
    *_faults(
        "autograd/cross_entropy.cpp",
        AUTOGRAD,
        (
            "return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);",
            "return false;",
        ),
        ("tangent_of(x).defined() ? x._fw_primal(/*level=*/0) : x;", "x;"),
        ("sum.defined() ? sum + term : term;", "term;"),
        ("if (like.dim() == 0) return at::sum(product, like.scalar_type());", ""),
        ("if (ensemble && like.dim() == 1)", "if (ensemble && like.dim() == 2)"),
        ("    ignore_index_ = ignore_index;", ""),
        ("    label_smoothing_ = label_smoothing;", ""),
        ("    logits_.reset_data();", ""),
        ("if (!grad_output.is_cpu() || grad_output.dim() != 0) return false;", ""),
        ("*grad_output.const_data_ptr<float>() == 1.0f", "true"),
        ("ops::rescale_(saved, grad_output, normalizer);", ";"),
        ("return {rescaled(saved, grad_output, normalizer)};", "return {saved};"),
        ("return reduction != reduction_none && !in_transform()", "return !in_transform()"),
        ("TORCH_CHECK_VALUE(logits.layout() == at::kStrided,", "TORCH_CHECK_VALUE(true,"),
        ("torch::autograd::compute_requires_grad(*weight) ||", ""),
        ("if (requires_grad && computes_gradient(", "if (computes_gradient("),
        ("node->has_gradient_ = gradient.defined();", "node->has_gradient_ = true;"),
        ("(x, /*finished=*/false)", "(x, /*finished=*/true)"),
        ("set_tangent(loss, inner_product(slope, tangent, loss, weights));", ";"),
        ("    if (torch::autograd::get_current_graph_task_keep_graph())", "    if (false)"),
        ("ops::rescale_(gradient, grad_output, normalizer);", ";"),
        ("TORCH_CHECK(!at::GradMode::is_enabled(),", "TORCH_CHECK(true,"),
        ("!(owner.is_leaf() && owner.requires_grad()),", "!(logits.is_leaf() && logits.requires_grad()),"),
        ("  at::assert_no_internal_overlap(logits);", ""),
        ("TORCH_CHECK_VALUE(x.reduction != reduction_none,", "TORCH_CHECK_VALUE(true,"),
        ("tangent_of(x.logits).defined() || (in_transform()", "(in_transform()"),
        ("(in_transform() && torch::autograd::compute_requires_grad(x.logits));", "false;"),
        ("if (const Tensor t = tangent_of(x.grad_output); t.defined()) add(directions, t);", ""),
        ("if (task_should_compute_output(i)) result[i]", "if (false) result[i]"),
        ("tangent.defined()) set_tangent(result, tangent);", "tangent.defined()) {}"),
        ("directions.push_back(primal_of(direction));", "directions.push_back(direction);"),
        (
            "if (torch::autograd::compute_requires_grad(x.directions, x.grad_output, x.logits)) {",
            "if (torch::autograd::compute_requires_grad(x.directions, x.logits)) {",
        ),
    ),
    *_faults(
        "cpu/perceptron.cpp",
        PERCEPTRON,
        ("data[n * row + d * column]", "data[n * member_.shape.inputs + d]"),
        ("data[n * from.stride(0)]", "data[n]"),
        ("if (index_ < 0 || x_.own_inputs()) {", "if (index_ < 0) {"),
        ("if (index_ < 0 || x_.own_target()) {", "if (index_ < 0) {"),
        ("is_ensemble(x_.clock) ? index_ : 0", "0"),
        ("member_.prepared = false;", ";"),
        ("member_.prepared = member_.block == member_.padded;", "member_.prepared = true;"),
        ("sums.loss / samples", "sums.loss"),
        ("if (velocity != nullptr) std::memcpy(velocity, other.velocity, size * sizeof(T));", ""),
        ("if (!finite[m]) return;", ""),
        ("if (step > x.step && recorded.contains(step - 1))", "if (recorded.contains(step - 1))"),
        ("if (finite[m]) std::swap(now, next);", "std::swap(now, next);"),
        ("if (finite[m] && recorded.contains(end - 1)) {", "if (recorded.contains(end - 1)) {"),
        ("step < end && finite[m]; ++step", "step < end; ++step"),
    ),
    *_faults(
        "perceptron_arguments.cpp",
        PERCEPTRON,
        ("second > 0 && second % (hidden + 1) == 0", "second > 0"),
        ("(step + record_every - 1) / record_every * record_every", "step"),
        ("(x.own_inputs() && x.inputs.size(0) == members)", "x.own_inputs()"),
        ("(x.own_target() && x.target.size(0) == members)", "x.own_target()"),
        ("descent.velocity.has_value() == descent.momentum.has_value()", "true"),
    ),
    *_faults(
        "cpu/perceptron_member.h",
        PERCEPTRON,
        ("    not_finite += moved - moved;", ""),
        ("step += momentum * load(velocity + i);", "step += load(velocity + i);"),
    ),
    *_faults(
        "cpu/perceptron_few_planes.h",
        PERCEPTRON,
        ("        last += x[k][c] - x[k][c];", ""),
        ("        by_output[outputs] -= sum;", ""),
        ("T sum = unit.bias * m[c];", "T sum = 0;"),
        ("            y[k][c] += moved * output[c];", ""),
        ("_mm512_cmp_pd_mask(x, Vec<double>{}, _CMP_NLE_UQ)", "_mm512_cmp_pd_mask(x, Vec<double>{}, _CMP_NLT_UQ)"),
    ),
    *_faults(
        "cpu/perceptron_block.h",
        PERCEPTRON,
        ("return x - x * value * value;", "return x;"),
        ("return x < T(0) ? Vec<T>{} : x;  // NaN stays", "return x > T(0) ? x : Vec<T>{};"),
        ("right |= is_top & here & ~seen;", "right |= is_top & here;"),
        ("result -= T(2) * value *", "result -= value *"),
        ("products.v_top = load(e(c)) == T(1) ? load(y(c)) : products.v_top;", ""),
    ),
    *_faults(
        "lanczos/perceptron_operator.cpp",
        f"{PERCEPTRON} spiral_curvature",
        ("if (!wanted[m]) continue;", ""),
        ("return rounded_at_random(apply(rounded_at_random(v, generator)), generator);", "return apply(v);"),
    ),
    *_faults(
        "lanczos/ritz_basis.cpp",
        LANCZOS,
        ("if (direction.back() > rounding(norm) && num_rows_ < dimension_) {", "if (num_rows_ < dimension_) {"),
        ("    asymmetry_ = std::max(asymmetry_, difference);", ""),
        ("    asymmetry_squares_ += difference * difference;", ""),
        ("rest > rounding(largest_length_) && num_rows_ < dimension_;", "num_rows_ < dimension_;"),
        ("return component * std::sqrt(static_cast<double>(dimension_));", "return component;"),
        ("  largest_length_ *= ratio;", ""),
        ("residual[i] -= value * coefficients[i];", ";"),
        ("std::max(largest_length_, length) < kShortest", "false"),
        ("if (!(length <= kLongest) ||", "if ("),
        ("asymmetry_squares_ * ratio * ratio;", "asymmetry_squares_;"),
    ),
    *_faults(
        "lanczos/row_algebra.cpp",
        f"{LANCZOS} device_path shards",
        ("if (last || !(share > negligible)) break;", "break;"),
        ("sum_shards(left.data(), count + 1);", ";"),
        ("options.dtype() == at::kFloat ?", "options.dtype() == at::kDouble ?"),
        ("std::sqrt(square); });", "square; });"),
    ),
    *_faults(
        "lanczos/spectrum.cpp",
        LANCZOS,
        ("next <= negligible_share(op) * largest", "next <= 0.0"),
        ("out.weights.push_back(pairs.vectors[i] * pairs.vectors[i]);", "out.weights.push_back(pairs.vectors[i]);"),
        ("beta.push_back(next / unit);", "beta.push_back(next);"),
        ("if (range > 0) orthogonalise(z, z, Rows(rows, 0, range));", ""),
        ("entries[i] /= units[i % 2];", "entries[i] /= units[0];"),
        (
            "fails(asymmetry, norm, seen, noisily)) out.asymmetry = asymmetry / norm;\n  return out;",
            "fails(asymmetry, norm, seen, noisily)) {}\n  return out;",
        ),
    ),
    *_faults(
        "lanczos/small_eigen.cpp",
        LANCZOS,
        ("      change_sign(first);", ""),
        ("e_[k + 1] *= c;", ";"),
        ("if (k > begin) e_[k - 1] = radius;", ""),
        ("above = cosine * beta[j + 1];", "above = beta[j + 1];"),
        ("for (double& value : pairs.values) value *= scale;", ""),
    ),
    *_faults(
        "lanczos/python_operator.cpp",
        f"{LANCZOS} batches",
        ("product_of(v.clone())", "product_of(v)"),
        ("const at::AutoGradMode grad_mode(grad_mode_);", ""),
        ("return plain ? product : at::empty_like(v).copy_(product);", "return product;"),
        ("product.scalar_type() != v.scalar_type() ||", ""),
        ("for (const auto& part : parts_) part->check_values();", ""),
    ),
    *_faults(
        "lanczos/graph_operator.cpp",
        f"hessian double_backward fingerprint {LANCZOS}",
        ("static_cast<uint32_t>(now._version()) == then.version &&", ""),
        ("now.const_data_ptr() == then.data &&", ""),
        ("if (part.numel() % 2 == 0 && part.storage_offset() % 2 != 0) part = part.clone();", ""),
        ("if (at::equal(now, values_)) return;", "return;"),
        ("TORCH_CHECK(false, labels_[first], kChanged);", "TORCH_CHECK(false, labels_[0], kChanged);"),
        ("x = x.addcmul(size, signs.to(x.options()), rounding_of(x.options()));", ";"),
    ),
    *_faults(
        "lanczos/fingerprint.cpp",
        "fingerprint",
        ("static_cast<int32_t>(random() >> 1 | 1)", "1"),
        ("i += kPlaces, power *= kRatio", "i += kPlaces"),
        ("x.is_cpu() && x.is_non_overlapping_and_dense()", "x.is_cpu()"),
    ),
    *_faults(
        "core/cross_entropy_row.h",
        f"{LOSS} cross_entropy_autograd",
        ("(rest < 1 ? rest - (sum - 1) : T(0))", "T(0)"),
        ("u * v - puv - pv * (u - pu)", "u * v - pv * (u - pu)"),
        (
            "at_label(scale * q.elsewhere - factor * sum.others)",
            "at_label(factor * sum.label - scale * (q.on_label + q.spread))",
        ),
    ),
    *_faults(
        "core/oscillation.h",
        LOSS,
        ("quotient += t < 0.0 ? -1.0 : 1.0;", "quotient += 1.0;"),
        ("next ? a.t - (turn - b.t) : a.t + b.t", "a.t + b.t"),
        ("step >= static_cast<int64_t>(clock.stop_step)", "step > static_cast<int64_t>(clock.stop_step)"),
    ),
    *_faults(
        "eager.cpp",
        "eager bad_input oscillation",
        ("count != 9 || at::impl::torch_function_mode_enabled()", "count != 9"),
        ("/*finished=*/true", "/*finished=*/false"),
        ("return label_smoothing >= 0 && label_smoothing <= 1;", "return true;"),
        ("logits.dim() > dim && classes && logits.sym_size(dim) == *classes;", "logits.dim() > dim;"),
    ),
    *_faults(
        "arguments.cpp",
        f"{LOSS} bad_input",
        ("return reduction == reduction_none || dtype == at::kDouble ? dtype : at::kFloat;", "return dtype;"),
        ("target.sym_size(d) == logits.sym_size(d == 0 ? 0 : d + 1)", "target.sym_size(d) == logits.sym_size(d)"),
    ),
]

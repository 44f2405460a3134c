"""Fingerprints of the parameters: a step that no version counter sees is noticed."""

import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y, mlp

from dynloss_ext import _C, EigenTracker, GaussNewtonOperator, HessianOperator, eigsh, spectral_density, trace


def fused(optimizer):
    def step(params):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer(params, lr=1e-3, fused=True).step()

    return step


def give_and_take(params):
    """The same sum of bits."""
    bits = params[0].data.view(-1).view(torch.int32)
    bits[0] += 8
    bits[2] -= 8


BEHIND_THE_COUNTER = {
    "SGD": fused(torch.optim.SGD),
    "Adam": fused(torch.optim.Adam),
    "data": lambda params: params[0].data.mul_(1 + 1e-6),
    "to NaN": lambda params: params[0].data.fill_(float("nan")),
    "exchanged": lambda params: params[0].data.copy_(params[0].data.flip(0)),
    "given and taken": give_and_take,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", BEHIND_THE_COUNTER)
def test_a_step_that_no_version_counter_sees_is_refused_by_every_solve(how, dtype):
    params = [*mlp(dtype), torch.tensor([3.0], dtype=dtype).requires_grad_()]
    params[2] = params[2].detach()[:, ::2].requires_grad_()  # with gaps in between
    params[3] = params[3].detach()[:2].clone().requires_grad_()

    def loss():
        hidden = torch.tanh(X.to(dtype) @ params[0] + params[1])
        return F.cross_entropy(params[4] * (hidden @ params[2] + params[3]), Y % 2)

    z = params[0] * 2
    made = [
        HessianOperator(loss(), params),
        GaussNewtonOperator(z.square().sum(), z, params[:1]),
        HessianOperator.from_batches(lambda _: (loss(), 1.0), params, [0]),
    ]
    versions = [p._version for p in params]
    for H in made:
        assert eigsh(H, 1).converged.all()
    BEHIND_THE_COUNTER[how](params)
    assert [p._version for p in params] == versions
    for H in made:
        for use in (eigsh, EigenTracker(1).update, spectral_density, trace, HessianOperator.to_dense):
            with pytest.raises(RuntimeError, match=r"params.*: expected .* got .* changed in place"):
                use(H)


def by_hand(x, table):
    """Σ w_i f_i modulo 2⁶⁴ in Python's integers."""
    words = x.detach().reshape(-1).contiguous().view(torch.int32).tolist()
    return sum(word * factor for word, factor in zip(words, table, strict=False)) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints(dtype):
    """All ways to compute them agree, on the sum by hand with the factors that unit vectors show."""
    generator = torch.Generator().manual_seed(0)
    length = 10_000  # more than two blocks of factors
    one = torch.zeros(length, dtype=torch.int32)
    table = []
    for i in range(length):
        one[i] = 1
        table.append(int(_C.fingerprints([one.view(torch.float32)])))
        one[i] = 0
    assert all(factor % 2 for factor in table)
    assert len(set(table)) == length
    x = torch.randn(length // 2, dtype=dtype, generator=generator)
    with_gaps = torch.stack([x, x], 1)[:, 0]
    assert not with_gaps.is_contiguous()
    expected = by_hand(x, table)
    for given in (x, with_gaps, x.view(50, 100), x.view(100, 50).T):  # the last has the same memory
        assert int(_C.fingerprints([given])) % 2**64 == expected
    assert by_hand(x.flip(0), table) != expected
    assert _C.fingerprints([x[:0], x[0], x[:1]]).tolist()[0] == 0
    assert int(_C.fingerprints([x[0]])) == int(_C.fingerprints([x[:1]]))


def test_fingerprints_of_what_a_device_takes_in_pieces():
    """More than is taken at once, with gaps, as of tensors on a device."""
    x = torch.randn(1_500_000, generator=torch.Generator().manual_seed(0))
    assert int(_C.fingerprints([torch.stack([x, x], 1)[:, 0]])) == int(_C.fingerprints([x]))


def test_any_exchange_of_two_values_shows():
    """Also of values whose bits differ by a power of two, far apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(200_000)
    before = int(_C.fingerprints([x]))
    for exponent in range(-100, 100, 7):
        prints = set()
        for place in torch.randint(len(x), (20,), generator=generator).tolist():
            x[place] = 2.0**exponent
            prints.add(int(_C.fingerprints([x])))
            x[place] = 1.0
        assert before not in prints or exponent == 0
        assert len(prints) >= 19 or exponent == 0


def test_strides_changed_behind_the_counter_are_noticed():
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    H = HessianOperator(w.pow(3).sum(), [w])
    w.data = w.data.T
    with pytest.raises(RuntimeError, match=r"params\[0\]: expected .* changed in place"):
        H @ torch.ones(9, dtype=torch.float64)

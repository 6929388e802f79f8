import pytest
import torch
from matplotlib.figure import Figure

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.leakage import spectral_density, spectrum
from gradguard.zoo.models import fcn, lenet, uniform_init_


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def jacobian(cross_entropy, batch):
    torch.manual_seed(1)
    return InputJacobian(LossGradient(uniform_init_(lenet(image_size=8)).double(), cross_entropy), *batch)


@pytest.fixture
def quick(cross_entropy, batch):
    torch.manual_seed(1)
    model = fcn((64, 48, 10), activation="tanh", bias=True).double()
    return InputJacobian(LossGradient(model, cross_entropy), *batch)


def exact(jacobian):
    return torch.linalg.svdvals(jacobian.dense()) ** 2


def residuals(jacobian, found):
    products = [jacobian.gram(v.reshape(jacobian.inputs.shape)).flatten(1) for v in found.vectors.unbind(1)]
    return (torch.stack(products, 1) - found.values[..., None] * found.vectors).norm(dim=-1)


@pytest.mark.parametrize("method", ["dense", "gram"])
def test_the_whole_spectrum(jacobian, method):
    found = spectrum(jacobian, "all", method=method)
    assert found.complete
    assert found.method == method
    assert found.index.tolist() == list(range(64))
    reference = exact(jacobian)
    bound = found.residual + 1e-6 * reference
    assert ((found.values - reference).abs() <= bound).all()
    assert (residuals(jacobian, found) <= found.residual + 1e-10 * reference[:, :1]).all()
    identity = torch.eye(64).double().expand(4, 64, 64)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, identity, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["gram", "lanczos"])
@pytest.mark.parametrize("which", ["leading", "smallest", "both"])
def test_a_few_at_either_end(jacobian, which, method):
    found = spectrum(jacobian, 4, which=which, method=method, tolerance=1e-8, generator=seeded())
    places = {"leading": [0, 1, 2, 3], "smallest": [60, 61, 62, 63]}
    assert found.index.tolist() == places.get(which, places["leading"] + places["smallest"])
    assert found.method == method
    assert not found.complete
    reference = exact(jacobian)[:, found.index]
    assert ((found.values - reference).abs() <= found.residual + 1e-7 * reference[:, :1]).all()
    assert (residuals(jacobian, found) <= 1.01 * found.residual + 1e-12).all()


def test_lanczos_says_how_far_it_may_be_off(jacobian):
    found = spectrum(jacobian, 2, which="smallest", method="lanczos", max_iterations=12, generator=seeded())
    distance = (exact(jacobian)[:, None] - found.values[..., None]).abs().amin(-1)
    assert (distance <= found.residual).all()
    assert (found.values[:, -1] >= exact(jacobian)[:, -1]).all()


def test_the_two_ends_never_overlap(quick):
    found = spectrum(quick, 40, which="both", method="gram")
    assert found.complete
    assert found.index.tolist() == list(range(64))


def test_per_element_count_of_products_is_chunked(quick):
    """A `J J^T` formed a few rows at a time is the same."""
    small = InputJacobian(quick.gradient, quick.inputs, quick.targets, chunk_size=1)
    torch.testing.assert_close(
        spectrum(small, "all", method="gram").values, spectrum(quick, "all", method="gram").values
    )


def test_spectrum_bad_arguments(quick, monkeypatch):
    with pytest.raises(InputError, match='`which` must be "leading", "smallest" or "both", got \'all\''):
        spectrum(quick, which="all")
    with pytest.raises(InputError, match='`count` must be a positive number or "all", got 0'):
        spectrum(quick, 0)
    with pytest.raises(InputError, match="`method` must be"):
        spectrum(quick, method="magic")
    monkeypatch.setitem(spectrum.__globals__, "GRAM_SIZE", 10)
    with pytest.raises(InputError, match='`count="all"` forms J J\\^T, and 64 input elements are more than 10'):
        spectrum(quick, "all", method="lanczos")


# ---------------------------------------------------------------------- density


@pytest.mark.parametrize(("which", "probes"), [("quick", 200), ("jacobian", 12)])
def test_counts_are_those_of_the_dense_spectrum(request, which, probes):
    jacobian = request.getfixturevalue(which)
    reference = exact(jacobian)
    density = spectral_density(jacobian, probes=probes, steps=64, generator=seeded())
    torch.testing.assert_close(density.weights.sum(-1), torch.full((4, probes), 64.0).double())
    # In the widest gaps: many eigenvalues of the one model are all but the same, and a count there says nothing.
    gaps = -reference.log().diff(dim=1)
    for place in gaps.topk(3, dim=1).indices.unbind(1):
        bound = (reference.gather(1, place[:, None]) * reference.gather(1, place[:, None] + 1)).sqrt()[:, 0]
        true = (reference < bound[:, None]).sum(-1)
        below, error = density.count_below(bound)
        assert ((below - true).abs() <= 4 * error + 0.5).all()
        above, same = density.count_above(bound)
        torch.testing.assert_close(below + above, torch.full((4,), 64.0).double())
        torch.testing.assert_close(same, error)
    assert (density.count_below(0.0)[0] == 0).all()


def test_few_steps_tell_the_moments(quick):
    """The mean of the eigenvalues is exact in each probe's expectation, whatever the steps."""
    density = spectral_density(quick, probes=400, steps=3, generator=seeded())
    trace = (density.nodes * density.weights).sum(-1).mean(-1)
    torch.testing.assert_close(trace, exact(quick).sum(-1), rtol=0.02, atol=0)
    assert density.iterations == 3


def test_the_smoothed_density_integrates_to_the_count(quick):
    density = spectral_density(quick, probes=4, steps=20, generator=seeded())
    grid, height = density.on_grid(2000)
    torch.testing.assert_close(
        torch.trapezoid(height, grid, dim=-1), torch.full((4,), 64.0).double(), rtol=1e-3, atol=0
    )


def test_density_bad_arguments(quick):
    with pytest.raises(InputError, match="`probes` must be at least 2 and `steps` at least 1, got 1 and 40"):
        spectral_density(quick, probes=1)
    with pytest.raises(InputError, match="`bandwidth` must be positive"):
        spectral_density(quick, steps=2).plot(bandwidth=0.0)


# ---------------------------------------------------------------------- plots


def drawn(figure):
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return figure.axes[0]


def test_plots_of_a_few_problems_have_a_line_each(quick):
    assert len(drawn(spectrum(quick).plot()).lines) == 4
    assert len(drawn(spectrum(quick, 3, which="both", method="gram").plot()).lines) == 8
    axes = drawn(spectral_density(quick, steps=5).plot())
    assert len(axes.lines) == 4
    assert axes.get_xscale() == "log"


def test_plots_of_many_problems_show_their_median_and_range(quick, digit_pictures):
    pictures, labels = digit_pictures.images[:10].double(), digit_pictures.labels[:10]
    many = InputJacobian(quick.gradient, pictures, labels)
    for figure in (spectrum(many).plot(), spectral_density(many, steps=5, probes=2).plot()):
        axes = drawn(figure)
        assert len(axes.lines) == 1
        assert axes.get_legend().get_texts()[0].get_text() == "median and range of 10 problems"

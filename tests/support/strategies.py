"""Values that hypothesis draws."""

from hypothesis import strategies as st

from kquant.config.specs import METHODS, WEIGHT_METHODS, QuantSpec


@st.composite
def specs(draw, weights=False):
    """Any spec, of weights or of activations."""
    edges = st.tuples(st.floats(-1e6, 0, exclude_max=True), st.floats(0, 1e6))
    symmetric = draw(st.booleans())
    signed = draw(st.booleans()) if symmetric else True
    return QuantSpec(
        bits=draw(st.integers(2, 16)),
        symmetric=symmetric,
        signed=signed,
        narrow_range=draw(st.booleans()) if symmetric and signed else False,
        per_channel=draw(st.booleans()),
        power_of_two=draw(st.booleans()) if symmetric else False,
        method=draw(st.sampled_from(WEIGHT_METHODS if weights else METHODS)),
        percentile=draw(st.floats(50, 100, exclude_min=True)),
        range=None if weights else draw(st.none() | edges),
    )

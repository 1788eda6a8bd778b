"""What Hypothesis draws: models as integers, and what they may become."""

from hypothesis import Phase, settings
from hypothesis import strategies as st

from planners.model.form import LayerForm, ModelForm
from planners.model.layer import ROLES
from tests.shapes import llama_shape

DTYPES = ("float32", "bfloat16", "float16")


def whole_runs(*, one_in: int) -> settings:
    """Return settings for a test whose every example is a whole run, drawn by its seed.

    Of the examples of the profile there is one in so many. A failure is not shrunk: a schedule is
    a seed, and no other is simpler.
    """
    return settings(
        max_examples=settings().max_examples // one_in, phases=(Phase.explicit, Phase.generate)
    )


@st.composite
def shapes(draw, *, max_layers=4, max_groups=3):
    """Draw a small model of any supported type."""
    model_type = draw(st.sampled_from(("llama", "mistral", "qwen2")))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, max_groups))
    attention_bias = model_type == "llama" and draw(st.booleans())
    return llama_shape(
        family="llama",
        model_type=model_type,
        num_layers=draw(st.integers(1, max_layers)),
        hidden=heads * draw(st.integers(1, 9)),
        intermediate=draw(st.integers(1, 40)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 50)),
        tied=draw(st.booleans()),
        qkv_bias=model_type == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=model_type == "llama" and draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@st.composite
def model_forms(draw, shape):
    """Draw widths for every layer; the residual stream that leaves one enters the next."""
    widths = st.integers(1, shape.hidden)
    residual = [draw(widths) for _ in range(2 * shape.num_layers + 1)]
    tied = draw(st.booleans())
    if tied:
        residual[-1] = residual[0]
    return ModelForm(
        layers=tuple(
            draw(_layer_forms(shape, residual[2 * i : 2 * i + 3])) for i in range(shape.num_layers)
        ),
        embedding_dim=residual[0],
        head_dim=residual[-1],
        head_norm_weight=draw(st.booleans()),
        tied=tied,
        native=False,
    )


@st.composite
def _layer_forms(draw, shape, residual):
    ranks = st.dictionaries(st.sampled_from(ROLES), st.integers(1, 12), max_size=4)
    return LayerForm(
        residual_in=residual[0],
        residual_mid=residual[1],
        residual_out=residual[2],
        shortcuts=draw(st.booleans()),
        norm_weights=draw(st.booleans()),
        intermediate=draw(st.integers(1, shape.intermediate)),
        qk_head_dim=2 * draw(st.integers(1, shape.head_dim // 2)),
        vo_head_dim=draw(st.integers(1, shape.head_dim)),
        biases=tuple(role for role in ROLES if draw(st.booleans())),
        ranks=draw(ranks),
    )

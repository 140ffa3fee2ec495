"""What the ablations change, by the question that each change answers."""

from typing import NamedTuple


class Variant(NamedTuple):
    question: str
    label: str
    changes: dict | None = None  # arguments of the method
    rho_factor: float = 1.0
    rate_factor: float = 1.0  # of the matrices' learning rate; in fine-tuning of the only one
    pretraining: str = "lorenza"  # the methods that are changed; "" for none
    fine_tuning: str = "lorenza_zo"
    also_larger: bool = False  # whether pre-training's larger Llama is asked, too

    @property
    def is_of_default(self):
        """Whether it is LORENZA with its defaults that is changed."""
        return self.pretraining in ("lorenza", "") and self.fine_tuning in ("lorenza_zo", "")


def _only_pretraining(question, label, **rest):
    return Variant(question, label, **{"fine_tuning": "", **rest})


SIGN = "Sign of the perturbation (rho)"
RADIUS = "Radius (rho)"
DIFFERENCE = "Smoothing (mu) and estimator"
PROBES = "Number of probes (num_probes)"
ASCENT = "Ascent (ascent)"
TRANSPORT = "Moments at a refresh (moment_transport)"
SIDE = "Compressed side (proj_type)"
STEP = "Size of the matrices' step (scale)"
DTYPES = "Precision of factors and moments (factor_dtype, moment_dtype)"
ADD_BACK = "Lorenza+ (add_back)"

VARIANTS = {
    "sign": Variant(SIGN, "as printed, -rho", rho_factor=-1.0),
    "sign_subspace": Variant(
        SIGN, '-rho, ascent="subspace"', None, -1.0,
        pretraining="lorenza_subspace", fine_tuning="lorenza_subspace",
    ),
    "rho0": Variant(RADIUS, "0", rho_factor=0.0, also_larger=True),
    "rho_third": _only_pretraining(RADIUS, "rho / 3", rho_factor=1 / 3),
    "rho_3": _only_pretraining(RADIUS, "3 rho", rho_factor=3.0),
    "rho_10": _only_pretraining(RADIUS, "10 rho", rho_factor=10.0),
    "rho_third_subspace": Variant(
        RADIUS, 'rho / 3, ascent="subspace"', None, 1 / 3,
        pretraining="lorenza_subspace", fine_tuning="lorenza_subspace",
    ),
    "rho_3_subspace": Variant(
        RADIUS, '3 rho, ascent="subspace"', None, 3.0,
        pretraining="lorenza_subspace", fine_tuning="lorenza_subspace",
    ),
    # The smaller of the radii that its tuning offers was the better one on each task.
    "rho_third_sam": Variant(
        RADIUS, "rho / 3, SAM", None, 1 / 3, pretraining="", fine_tuning="sam"
    ),
    "central_small": _only_pretraining(
        DIFFERENCE, "central, mu = 1e-4", changes={"estimator": "central", "mu": 1e-4}
    ),
    "central": _only_pretraining(
        DIFFERENCE, "central, mu = 1e-3", changes={"estimator": "central", "mu": 1e-3}
    ),
    "central_large": _only_pretraining(
        DIFFERENCE, "central, mu = 1e-1", changes={"estimator": "central", "mu": 1e-1}
    ),
    "forward": _only_pretraining(
        DIFFERENCE, "forward, mu = 1e-3", changes={"estimator": "forward", "mu": 1e-3}
    ),
    "probes_4": _only_pretraining(PROBES, "4", changes={"num_probes": 4}),
    "probes_16": _only_pretraining(PROBES, "16", changes={"num_probes": 16}),
    "momentum": Variant(ASCENT, '"momentum"', {"ascent": "momentum"}),
    "signed_momentum": Variant(ASCENT, '"signed_momentum"', {"ascent": "signed_momentum"}),
    "subspace": _only_pretraining(ASCENT, '"subspace"', changes={"ascent": "subspace"}),
    "rotate": Variant(
        TRANSPORT, '"rotate"', {"moment_transport": "rotate"}, also_larger=True
    ),
    "reset": _only_pretraining(TRANSPORT, '"reset"', changes={"moment_transport": "reset"}),
    "reverse_std": _only_pretraining(SIDE, '"reverse_std"', changes={"proj_type": "reverse_std"}),
    "left": _only_pretraining(
        SIDE, '"left"', changes={"proj_type": "left"}, also_larger=True
    ),
    "squares_transposed": _only_pretraining(
        SIDE, '"std", of squares the output',
        changes={"weight_dimension_numbers": "squares_transposed"}, also_larger=True,
    ),
    "right": _only_pretraining(SIDE, '"right"', changes={"proj_type": "right"}),
    "scale_half": _only_pretraining(STEP, "half", rate_factor=0.5),
    "scale_2": _only_pretraining(STEP, "twice", rate_factor=2.0),
    "factors_bf16": _only_pretraining(
        DTYPES, "factors in bfloat16", changes={"factor_dtype": "bfloat16"}
    ),
    "moments_bf16": _only_pretraining(
        DTYPES, "moments in bfloat16", changes={"moment_dtype": "bfloat16"}
    ),
    "moments_int8": _only_pretraining(
        DTYPES, "moments in int8", changes={"moment_dtype": "int8"}
    ),
    "sketch": _only_pretraining(
        "Source of a new subspace (refresh)", '"sketch"', changes={"refresh": "sketch"}
    ),
    "sumo": Variant(
        ADD_BACK, '"sumo"', {"add_back": "sumo"},
        pretraining="lorenza_plus", fine_tuning="lorenza_plus",
    ),
}  # fmt: skip

r"""Does a map tell what the model uses? Tests that run the model again, the answer held fixed.

TAM (Supp. E) sets faithfulness aside because an edited image changes the text that is written. A
denoising model can be asked about a given text: every token is read again in the state in which it
was committed, whatever the image. So nothing vanishes and nothing shifts.

- :func:`deletion`, :func:`insertion`: the word's probability as the image goes or comes
- :func:`correction`: how little must go for a wrong word to give way to the right one (EAGLE's
  AMCR and CSR)
- :func:`arcc`: pytorch-grad-cam's mean of removal, coherency and complexity
- :func:`infidelity`, :func:`sensitivity_max`: Captum's, for maps of image tokens
- :func:`parameter_randomization`, :func:`answer_shuffle`, :func:`placebo`: sanity checks

All take a bound :class:`~captum_dcam.model.forward.DenoisingForward` of one example
(:func:`captum_dcam.model.forward.single`), targets, and maps (one (N, h, w) per grid) or a callable
``explain(forward, targets) -> maps``, for example::

    >>> from captum_dcam.methods import AttributionTask, method
    >>> def explain(forward, targets):
    ...     return method("tam").attribute(AttributionTask(forward, targets)).maps
"""

from captum_dcam.faithfulness.arcc_metric import Arcc, arcc
from captum_dcam.faithfulness.captum_metrics import infidelity, sensitivity_max
from captum_dcam.faithfulness.corrections import REMOVED, Corrections, correction
from captum_dcam.faithfulness.curves import FRACTIONS, Curves, deletion, insertion
from captum_dcam.faithfulness.reading import Explain
from captum_dcam.faithfulness.sanity import (
    Randomization,
    answer_shuffle,
    parameter_randomization,
    placebo,
    shuffled_answer,
    structural_similarity,
)
from captum_dcam.methods.edited import BASELINES

__all__ = [
    "BASELINES",
    "FRACTIONS",
    "REMOVED",
    "Arcc",
    "Corrections",
    "Curves",
    "Explain",
    "Randomization",
    "answer_shuffle",
    "arcc",
    "correction",
    "deletion",
    "infidelity",
    "insertion",
    "parameter_randomization",
    "placebo",
    "sensitivity_max",
    "shuffled_answer",
    "structural_similarity",
]

"""What a transform of an update is, and how several of them follow each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedsim.records import Params
from fedsim.wire.quantised import CODINGS

EXACT = "exact"


@dataclass(frozen=True)
class Selection:
    """Which entries of an update are sent; all others are read as 0.

    pick: (floating tensors, key) -> bool tensors of their names and shapes.
    drawn: from the key and the shapes alone, so the server draws the same, and no positions are sent.
    """

    pick: Callable[[Params, int], Params]
    drawn: bool


@dataclass(frozen=True)
class Transform:
    """One step on an update's way to the server: it selects entries, or it codes their values.

    coding: a name of :data:`fedsim.wire.quantised.CODINGS`.
    error_feedback: the client remembers what was lost, and adds it to its next update.
    """

    name: str
    selection: Selection | None = None
    coding: str | None = None
    error_feedback: bool = False


@dataclass(frozen=True)
class Compression:
    """All transforms of a federation as one: at most one selection, then one coding. Can be pickled.

    error_feedback: of all that is lost, by whichever of the two.
    """

    selection: Selection | None
    coding: str
    error_feedback: bool

    @property
    def drawn(self) -> bool:
        """Whether the server knows which entries are sent without being told."""
        return self.selection is not None and self.selection.drawn

    @property
    def unbiased(self) -> bool:
        """Whether what is selected is scaled up, so that its mean over keys is the update.

        Not under error feedback, whose memory would grow: what is lost must be smaller than what is sent.
        """
        return self.drawn and not self.error_feedback


def compose(transforms: Sequence[Transform]) -> Compression | None:
    """Transforms, in the order in which they are applied; None if there are none.

    Raises:
        ValueError: a second selection or a second coding, or a selection after a coding; says why.
    """
    selecting: Transform | None = None
    coding: Transform | None = None
    for one in transforms:
        if one.selection is not None:
            if coding is not None:
                why = "what was coded are bytes, of which no entries can be picked"
                raise ValueError(f"{one.name} must come before {coding.name}: {why}")
            if selecting is not None:
                raise ValueError(f"at most one may select entries, got {selecting.name} and {one.name}")
            selecting = one
        if one.coding is not None:
            if one.coding not in CODINGS:
                raise ValueError(f"{one.name}: coding must be one of {', '.join(CODINGS)}, got {one.coding!r}")
            if coding is not None:
                raise ValueError(f"at most one may code values, got {coding.name} and {one.name}")
            coding = one
    if not transforms:
        return None
    return Compression(
        selection=None if selecting is None else selecting.selection,
        coding=EXACT if coding is None or coding.coding is None else coding.coding,
        error_feedback=any(one.error_feedback for one in transforms),
    )

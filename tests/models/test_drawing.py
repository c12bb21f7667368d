from fedsim.models.drawing import NAMED, UNTOLD, Draws


def test_a_model_without_draws_of_its_own_has_nothing_to_tell() -> None:
    assert UNTOLD.told() == ()
    assert UNTOLD.record() == {"keyed": [], "seeded": None}


def test_one_layer_is_named_in_the_singular_and_of_many_only_the_first() -> None:
    assert Draws(("drop",)).told() == ("model: replaced dropout layer drop by a keyed one",)
    paths = tuple(f"body.{i}" for i in range(NAMED + 3))
    (line,) = Draws(paths).told()
    assert line == f"model: replaced dropout layers {', '.join(paths[:NAMED])} and 3 more by keyed ones"
    assert Draws(paths).record()["keyed"] == list(paths)
    assert "more" not in Draws(paths[:NAMED]).told()[0]


def test_a_model_that_draws_from_torchs_generator_tells_where_and_what_that_means() -> None:
    draws = Draws(("drop",), "lstm (LSTM)")
    keyed, seeded = draws.told()
    assert keyed.endswith("drop by a keyed one")
    assert seeded == (
        "model: draws from torch's global generator (lstm (LSTM)); its draws are seeded per client and round, so the "
        "run repeats with the same torch version, but each client is trained by itself"
    )
    assert draws.record() == {"keyed": ["drop"], "seeded": seeded}

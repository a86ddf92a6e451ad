"""Small cyclic games: the objective's policy against brute force, beside self-play."""

import numpy as np
import pytest
from matplotlib import image
from scipy import optimize

from experiments import preferences as games


def test_brute_force_agrees_with_a_linear_program_without_entropy(monkeypatch):
    """max v with P_j(pi > y') >= v for every objective and opponent."""
    monkeypatch.setattr(games, "BETA", 1e-3)
    for game in games.GAMES.values():
        against = np.concatenate([-p.T for p in game.preference])  # [J x 3, 3]
        above = np.hstack([against, np.ones((len(against), 1))])
        simplex = dict(A_eq=[[1, 1, 1, 0]], b_eq=[1], bounds=[(0, 1)] * 4)
        found = optimize.linprog([0, 0, 0, -1], A_ub=above, b_ub=np.zeros(len(above)), **simplex)
        assert found.success
        _, value = games.brute_force(game)
        assert abs(value + found.fun) < 0.003  # the grid's step, and what entropy is left


@pytest.fixture(scope="module")
def runs():
    """Policies by game and method, as the command draws them."""
    policies = lambda game: {m: games.train(game, f, seed=0) for m, f in games.METHODS.items()}
    return {name: policies(game) for name, game in games.GAMES.items()}


@pytest.mark.parametrize("name", games.GAMES)
def test_the_policy_reaches_the_value_of_brute_force_where_self_play_cycles(name, runs):
    game = games.GAMES[name]
    best, highest = games.brute_force(game)
    assert best.min() > 0.1  # inside of the simplex: no pure policy will do
    assert games.value(game, games.START) < highest - 0.02
    prosper, self_play = runs[name].values()
    late = len(prosper) // 4
    for policy in (prosper[-1], prosper[-late:].mean(0)):
        assert highest - 0.01 < games.value(game, policy) < highest + 0.002
    values = games.value(game, self_play[len(self_play) // 2 :])
    assert values.min() < highest - 0.2
    assert values.max() - values.min() > 0.1
    assert games.value(game, self_play[-late:].mean(0)) < highest - 0.02
    # It goes round the middle of the simplex.
    x, y = ((self_play - 1 / 3) @ np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])).T
    angle = np.unwrap(np.arctan2(y, x))
    assert abs(angle[-1] - angle[0]) > 2 * np.pi


def test_the_picture_shows_both_methods_in_every_game(runs, tmp_path, monkeypatch):
    """Their way through the simplex, and the values on it, in a picture of some detail."""
    drawn = []
    monkeypatch.setattr(games.plt, "close", drawn.append)
    games.plot(runs, tmp_path / "preferences.png")
    monkeypatch.undo()
    panels = np.array(drawn[0].axes).reshape(len(games.GAMES), 2)
    corners = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
    for (name, policies), (where, values) in zip(runs.items(), panels, strict=True):
        assert name in where.get_title()
        for method, way in policies.items():
            of_method = lambda panel, label=method: next(
                line for line in panel.lines if line.get_label() == label
            )
            np.testing.assert_allclose(of_method(where).get_xydata(), way @ corners)
            expected = games.value(games.GAMES[name], way)
            np.testing.assert_allclose(of_method(values).get_ydata(), expected)
    games.plt.close(drawn[0])
    assert image.imread(tmp_path / "preferences.png").std() > 0.05

"""What --dry-run says of the time, against a generator whose time is known."""

import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from compress import summary
from compress.forms import form_named
from compress.plan import plan
from compress.presets import HIGH
from compress.records import Recipe, Records
from compress.regenerate import Regenerator
from tests.little_run import little_dataset


@dataclass
class Clockwork:
    """Takes 10 s a batch for texts and decoder, 1 s a step, and 0.1 s a step that reuses deep features."""

    reuse_every: int
    is_ddim: bool
    batch_size: int = 4
    now: float = 0.0
    runs: list[int] = field(default_factory=list)

    def __call__(self, batch, steps=None):
        made = len(range(0, 1000, 1000 // steps)) if self.is_ddim else steps  # the published DDIM's steps
        self.runs.append(steps)
        self.now += 10 + sum(0.1 if i % self.reuse_every else 1.0 for i in range(made))
        return [np.zeros((*request.condition.size, 3), np.uint8) for request in batch]


@pytest.mark.parametrize(
    ("sampler", "steps", "reuse_every", "true"),
    [
        ("ddim", 20, 1, 30.0),
        ("ddim", 30, 1, 41.0),  # 31 steps
        ("ddim", 50, 5, 10 + 10 * 1.4),
        ("ddim", 20, 10, 10 + 2 * 1.9),
        ("dpm++2m", 4, 1, 14.0),
        ("dpm++2m", 30, 3, 10 + 10 * 1.2),
    ],
)
def test_the_time_of_a_copy(tmp_path, monkeypatch, sampler, steps, reuse_every, true):
    preset = HIGH.changed(size=64, steps=steps, sampler=sampler, reuse_every=reuse_every)
    paths, form = little_dataset(tmp_path), form_named("edges", preset)
    images = [image for label in paths.classes() for image in paths.images(label)]
    generator = Clockwork(reuse_every, sampler == "ddim")
    regenerator = Regenerator(plan(Records(paths, Recipe(form)), images, [0, 1]), generator)
    monkeypatch.setattr(time, "perf_counter", lambda: generator.now)
    expected = summary.estimate(regenerator)
    assert expected.seconds == pytest.approx(true * 8 / 4)
    assert max(generator.runs) <= max(steps, 10)


def test_processes_share_the_time(tmp_path, monkeypatch, capsys):
    paths, form = little_dataset(tmp_path), form_named("edges", HIGH.changed(size=64, steps=20))
    images = [image for label in paths.classes() for image in paths.images(label)]
    generator = Clockwork(1, True)
    monkeypatch.setattr(time, "perf_counter", lambda: generator.now)
    regenerator = Regenerator(plan(Records(paths, Recipe(form)), images, [0, 1]), generator)
    summary.report_estimate(regenerator)
    summary.report_estimate(regenerator, processes=8)
    out = capsys.readouterr().out
    assert "about 0:01:00 for the copies\n" in out
    assert "about 7.5 s for the copies in 8 processes\n" in out

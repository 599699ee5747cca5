"""compress's parts put together as a session does, for tests that bring a model of their own."""

from compress.forms import form_named
from compress.generators.controlnet import PictureGenerator
from compress.plan import plan
from compress.records import Recipe, Records
from compress.regenerate import Regenerator


def edges(preset):
    """The form of edge maps with a preset's settings."""
    return form_named("edges", preset)


class Maker:
    """Plans and makes copies of a dataset with one model, None where no copy is missing."""

    def __init__(self, paths, preset, model, *, batch_size=None, form="edges", **how):
        self.paths, self.form, self.model = paths, form_named(form, preset), model
        self.generate = PictureGenerator(preset, model, batch_size=batch_size, **how)

    def plan(self, images, copy_numbers, **how):
        recipe = Recipe(self.form, getattr(self.model, "fingerprint", ""), "fp32")
        return plan(Records(self.paths, recipe), images, copy_numbers, **how)

    def run(self, todo, *progress):
        return Regenerator(todo, self.generate).run(*progress)

    def __call__(self, images, copy_numbers):
        return self.run(self.plan(images, copy_numbers))

    def requests(self, task):
        """The copies that a task's image lacks."""
        regenerator = Regenerator(self.plan([task.image], task.copy_numbers), self.generate)
        return regenerator.requests(task, regenerator.kept(task))

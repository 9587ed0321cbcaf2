"""What every stage of `teach` works with: the run folder, the recipe, and whom to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..localrun.core.reporter import SILENT, Reporter
from .recipe.gathering import RequestRecipe
from .recipe.teach import ResourcesRecipe, Stage, TeachRecipe
from .run import Run
from .teachers import Teacher, open_teacher


@dataclass(frozen=True)
class Context:
    """One run at work. `stop_after` names the stage after which this command ends; None runs to the end.

    `opener` opens teacher and judge, as `teachers.open_teacher` does.
    """

    run: Run
    recipe: TeachRecipe
    report: Reporter = SILENT
    stop_after: Stage | None = None
    opener: Callable[..., Teacher] = open_teacher

    @property
    def resources(self) -> ResourcesRecipe:
        """What this command may use: device, requests in flight, network."""
        return self.recipe.resources

    def open_teacher(self, model: str | None = None, server_model: str | None = None) -> Teacher:
        """Open the recipe's teacher, or another model that is given as a teacher is, such as a judge."""
        request: RequestRecipe | None = None
        if model is None:
            asked = self.recipe.teacher
            model, server_model, request = asked.model, asked.server_model, asked.request
        teacher = self.opener(model, model=server_model, request=request, **vars(self.resources))
        teacher.on_note = self.report.say
        return teacher

    def open_judge(self) -> Teacher:
        """Open the judge; on the teacher's own server it is the teacher's model unless it has a name of its own."""
        judge, teacher = self.recipe.judge, self.recipe.teacher
        same = judge.model in (None, teacher.model)
        return self.open_teacher(
            judge.model or teacher.model, judge.server_model or (teacher.server_model if same else None)
        )

    def open_student(self, folder: Path) -> Teacher:
        """Open a student's checkpoint, to answer or to be scored."""
        return open_teacher(str(folder), device=self.resources.device, batch_size=self.resources.batch_size)

"""Tasks: one file each, one table. What a row is, what the network is, the loss, what an answer looks like."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.tasks.image_classification import ImageClassification
from orchestrator.tasks.task import Task
from orchestrator.tasks.text_classification import TextClassification

TASKS: Mapping[str, Task] = {task.name: task for task in (TextClassification(), ImageClassification())}

__all__ = ["TASKS", "Task"]

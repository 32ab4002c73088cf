"""What a process of ``knobs.trained_by_two`` has when it is forked: importing transformers takes seconds."""

from orchestrator.data.torchvision_ops import ensure_torchvision

ensure_torchvision()

import transformers.models.auto.modeling_auto  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402, F401

import orchestrator.training.worker  # noqa: E402, F401

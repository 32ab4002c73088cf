"""An ensemble of two versions behind a real endpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from served_models import LABELS, publish_text_model
from test_serving_on_ray import ask, free_port, offline, scores, served

from orchestrator.data.encoders import load_encoder
from orchestrator.models.checkpoint import save_mixture
from orchestrator.models.ensemble import Mixture
from orchestrator.recipe_serving import Serving
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.ray
TEXTS = ["the coffee was great", "stale and dull", "we bought this because it was rich and smooth"]


def test_two_versions_answer_as_one(ray_session: object, tmp_path: Path, tiny_backbone: Path) -> None:
    from orchestrator.serving.on_ray import deploy, shutdown

    storage, same = Storage(str(tmp_path)), tuple(range(len(LABELS)))
    members = [storage.path(publish_text_model(storage, "reviews", version, tiny_backbone)) for version in (1, 2)]
    with storage.publish(version_location("reviews", 3)) as folder:
        mixture = Mixture(weights=(0.75, 0.25), orders=(same, same), encoders=(0, 0))
        save_mixture(folder, members, mixture, load_encoder(members[0]), LABELS, {})
    settings = Serving(port=free_port(), max_replicas=1, cpus_per_replica=0.5, precision="fp32")
    try:
        url = deploy(served(storage, settings, "reviews", 3))
        answer = ask(f"{url}/v1/models/reviews:predict", {"instances": TEXTS})
        told = ask(f"{url}/v1/models/reviews:explain", {"instance": TEXTS[0], "method": "occlusion"})
    finally:
        shutdown()
    one, other = (np.array(offline(storage, "reviews", version, TEXTS)) for version in (1, 2))
    assert np.abs(one - other).max() > 1e-3, "they differ"
    assert np.array(scores(answer)) == pytest.approx(0.75 * one + 0.25 * other, abs=1e-6)
    assert answer[1]["model_version"] == told[1]["model_version"] == "3" and told[0] == 200

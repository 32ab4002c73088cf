"""A training orchestrator on Ray: from a table of texts or a folder of images to a model behind an HTTP endpoint."""

__version__ = "0.1.0"

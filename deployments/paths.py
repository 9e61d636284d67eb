"""Paths that more than one place has to know."""

from __future__ import annotations

#: A model in the Open Inference Protocol, without its version and with it.
MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
#: What answers over HTTP without a key where `auth.open_health` says so.
HEALTH_PATHS = ("/ping", "/v2/health/live", "/v2/health/ready", *(f"{prefix}/ready" for prefix in MODEL_PATHS))
#: OpenAI's, which name the model in the body.
BY_BODY = ("/v1/embeddings", "/v1/completions", "/v1/chat/completions")

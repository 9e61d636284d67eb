"""What openai's client of version 1.0.0 gets: its interpreter runs this, `openai_1.py URL`, with the inputs on stdin.

Reads {"model", "inputs": {name: input}} and prints as JSON what each call returned.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import openai

_FORMATS: tuple[Literal["float", "base64"], ...] = ("float", "base64")


def ask(url: str, model: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the embeddings by input and format, the models, and the errors for a model that is not there."""
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
    found: dict[str, Any] = {"version": openai.__version__, "embeddings": {}, "errors": []}
    for name, given in inputs.items():
        # Without numpy beside it, this client asks for no format by itself.
        replies = {"default": _describe(client.embeddings.create(model=model, input=given))}
        for form in _FORMATS:
            replies[form] = _describe(client.embeddings.create(model=model, input=given, encoding_format=form))
        found["embeddings"][name] = replies
    found["models"] = [_describe_model(item) for item in client.models.list()]
    found["model"] = _describe_model(client.models.retrieve(model))
    for call in (
        lambda: client.embeddings.create(model="gpt-4", input="a"),
        lambda: client.models.retrieve("gpt-4"),
    ):
        try:
            call()
        except openai.NotFoundError as error:
            # The later ones have the code as an attribute.
            found["errors"].append({"status": error.status_code, "error": error.response.json()["error"]})
    client.close()
    return found


def _describe(reply: openai.types.CreateEmbeddingResponse) -> dict[str, Any]:
    return {
        "model": reply.model,
        "indices": [item.index for item in reply.data],
        "rows": [item.embedding for item in reply.data],  # base64 that is asked for by name stays text
        "tokens": [reply.usage.prompt_tokens, reply.usage.total_tokens],
    }


def _describe_model(model: openai.types.Model) -> dict[str, Any]:
    return {"id": model.id, "object": model.object, "created": model.created, "owned_by": model.owned_by}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], **json.load(sys.stdin))))

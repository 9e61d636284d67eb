"""LitServe with the same models, one worker, batches of at most 8 within 5 ms: python -m benchmarks.lit photos."""

from __future__ import annotations

import argparse
from typing import Any

import litserve

from benchmarks.baselines import SERVABLES, Eager
from benchmarks.workloads import make_payloads


class Api(litserve.LitAPI):  # type: ignore[misc]  # its package has no types
    """Takes a body as the field `data` of a form: LitServe decodes only forms and JSON by itself."""

    def __init__(self, workload: str, threads: int, *, compiled: bool) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.005, api_path="/predict")
        self._workload, self._threads, self._compiled = workload, threads, compiled

    def setup(self, device: str) -> None:
        """Load the model in the worker, and compile it before the first request."""
        self._answer = Eager(self._workload, self._threads, compiled=self._compiled)
        if self._compiled:  # one row, then with a free number of rows, which a second size brings about
            for rows in (1, 2, 8, 3, 5):
                self._answer(make_payloads(self._workload)[:rows])

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # it reads annotations, and takes them for schemas
        """Return the body."""
        return request["data"].file.read()

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Keep the list of bodies: the model's own code pads and stacks."""
        return inputs

    def predict(self, bodies: Any) -> list[Any]:
        """Answer every body."""
        return self._answer(bodies)

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Keep the list of answers."""
        return output

    def encode_response(self, output: Any) -> Any:
        """Return the answer, which is JSON-ready."""
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=SERVABLES)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    api = Api(options.workload, options.threads, compiled=options.compiled)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600)
    server.run(port=options.port, host="127.0.0.1", generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()

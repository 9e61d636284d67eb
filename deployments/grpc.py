"""The Open Inference Protocol v2 over gRPC, for Ray Serve's proxy: the calls that there are.

What a replica answers is in `grpc_calls`: the proxy needs neither that nor torch, which took 300 MB of it.
"""

from __future__ import annotations

from typing import Any

import grpc

from deployments.inference_messages import CALLS, PACKAGE, SERVICE, message_class


def add_inference_service(servicer: Any, server: grpc.Server) -> None:
    """Add the service's calls to a server; what `grpc_options.grpc_servicer_functions` names."""
    handlers = {
        call: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, call),
            # Not unpacked here, where nobody has looked at key and size yet: 1 MB can become 44 MB.
            request_deserializer=None if call == "ModelInfer" else message_class(f"{call}Request").FromString,
            response_serializer=message_class(f"{call}Response").SerializeToString,
        )
        for call in CALLS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{PACKAGE}.{SERVICE}", handlers),))

"""What runs inside vLLM's workers: takes the trainer's weights, and says what is served.

vLLM's environment is not r1pipe's: this file imports vLLM, torch and the standard library alone. A server is
started with its folder in PYTHONPATH and

    --worker-extension-cls r1pipe_vllm.Extension --weight-transfer-config '{"backend": "r1pipe"}'

vLLM's own transfer engines have none for a CPU. They all load weights layer by layer through vLLM's reload,
and so does this one; what a CPU needs beyond it is in `_pack_again` and `_pack_tied`.
"""

from dataclasses import dataclass
from typing import Any

import r1pipe_wire as wire
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.tokenizers import cached_tokenizer_from_config

BACKEND = "r1pipe"


@dataclass
class Connection(WeightTransferInitInfo):
    """Where the trainer's rank 0 waits for the workers."""

    address: str
    port: int
    name: str  # of the connection, new for each
    size: int  # the trainer's rank 0 and all workers
    over: str  # cpu: gloo; cuda: NCCL
    timeout_s: float
    protocol: int


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """What comes next."""

    layout: list[list[Any]]  # wire.Layout


class Engine(WeightTransferEngine[Connection, Bucket]):
    """Receives buckets of weights under the published names."""

    init_info_cls = Connection
    update_info_cls = Bucket
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module):
        super().__init__(config, vllm_config, device, model)
        self.group: Any = None
        self.over = torch.device("cpu")
        self.names = {name for name, _ in model.named_parameters()}
        self.loaded: set[str] = set()

    def init_transfer_engine(self, init_info: Connection) -> None:
        if init_info.protocol != wire.PROTOCOL:
            raise ValueError(f"the trainer speaks protocol {init_info.protocol}, not {wire.PROTOCOL}")
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.over = self.device if init_info.over == "cuda" else torch.device("cpu")
        where = init_info.address, init_info.port, init_info.name
        self.group = wire.connect(*where, rank, init_info.size, self.over, init_info.timeout_s)

    def start_weight_update(self) -> None:
        self.loaded = set()
        if self.device.type == "cpu":
            _pack_again(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        if self.group is None:
            raise RuntimeError("no trainer is connected")
        layout: Any = [tuple(entry) for entry in update_info.layout]
        received = wire.receive(self.group, layout, self.over)
        here = [(name, tensor.to(self.device)) for name, tensor in received]
        self.loaded |= set(self.model.load_weights(here) or ())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _pack_tied(self.model)

    def missing(self) -> list[str]:
        """The model's parameters that the open update has not reached yet."""
        return sorted(self.names - self.loaded)

    def shutdown(self) -> None:
        self.group = None


def _pack_again(model: torch.nn.Module) -> None:
    """Make vLLM pack experts again after an update.

    On a CPU it packs them for its kernel when they are first loaded, and leaves them as they came in a reload
    (vLLM 0.32), which the kernel then reads as packed: wrong, and silently so. Where there is no kernel yet,
    a load is the first.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_tied(model: torch.nn.Module) -> None:
    """Make vLLM pack a head again that is tied to the embedding.

    On a CPU each of the two has a packed copy of the weight that they share, and a reload renews the
    embedding's alone (vLLM 0.32): tokens then come from the head of the first weights, silently.
    """
    packed: list[Any] = [module for module in model.modules() if hasattr(module, "cpu_linear")]
    for module in packed:
        if any(other is not module and other.weight is module.weight for other in packed):
            module.quant_method.process_weights_after_loading(module)


def _vocabulary(model_config: Any) -> str:
    return wire.vocabulary_hash(cached_tokenizer_from_config(model_config).get_vocab())


class Extension:
    """Mixed into vLLM's workers; `POST /collective_rpc` calls its methods."""

    vllm_config: Any
    weight_transfer_engine: Engine

    def r1pipe_missing(self) -> list[str]:
        return self.weight_transfer_engine.missing()

    def r1pipe_facts(self) -> dict[str, Any]:
        """What this worker serves, for the trainer to compare with its own."""
        model = self.vllm_config.model_config
        config = model.hf_text_config
        return {
            "protocol": wire.PROTOCOL,
            "vocabulary": None if model.skip_tokenizer_init else _vocabulary(model),
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "max_model_len": model.max_model_len,
            "logprobs_mode": model.logprobs_mode,
            "device": self.vllm_config.device_config.device_type,
        }


WeightTransferEngineFactory.register_engine(BACKEND, Engine)

"""Which decoder reads and continues a model's texts."""

from r1pipe.model.cache import Decoder
from r1pipe.model.graphs import graph_decoder
from r1pipe.model.native import NativeDecoder, runs_natively
from r1pipe.model.precision import fp8_of
from r1pipe.model.transformer import DeepseekV3


def decoder_of(model: DeepseekV3, graphs: bool = False) -> Decoder:
    """The fastest decoder of the model, with its weights of now: training it further makes it stale.

    `graphs` asks for CUDA graphs. Raises ConfigError where they cannot be.
    """
    if fp8_of(model) is not None:  # the sampler multiplies as the trainer does; the rules refuse graphs
        return Decoder(model)
    if graphs:
        return graph_decoder(model)
    return NativeDecoder(model) if runs_natively(model) else Decoder(model)

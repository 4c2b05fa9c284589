"""Models of transformers as policy: its own classes compute, files stay in Hugging Face's layout.

Only a run that uses such a model imports transformers, which takes seconds.
"""

from r1pipe.model.hf.policy import HFModel, HFTrunk

__all__ = ["HFModel", "HFTrunk"]

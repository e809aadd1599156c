"""NeMo's pre-training data module, held to what this package promises. Import it late: it imports NeMo."""

from typing import Any

from megatron.core.datasets.gpt_dataset import GPTDataset
from nemo.collections.llm import PreTrainingDataModule

#: Megatron's own mark of padding; no tokenizer has such a token.
PADDING = -1


class TextDataset(GPTDataset):
    """Takes no token of the text for padding.

    Megatron masks the loss on the tokenizer's padding token, and turns it into token 0. Many tokenizers pad with their
    end-of-document token, which would then never be learnt.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pad_token_id = PADDING


class TextDataModule(PreTrainingDataModule):
    """Validates on the same samples whatever the number of training steps."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.dataset_cls = TextDataset
        # Without Transformer Engine NeMo asks for a mask [1, s, s] of each sample: the causal one, the layers' own.
        self.create_attention_mask = False

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Builds the datasets, the validation set for one validation.

        NeMo draws samples for all validations of a run, though each starts again from the first sample; their order
        would then depend on how many there are.
        """
        only_one = trainer_max_steps + 1
        super().build(trainer_max_steps, only_one, trainer_limit_val_batches, trainer_limit_test_batches)

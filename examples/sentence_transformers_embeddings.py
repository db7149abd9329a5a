"""Distils embeddings and scores in sentence-transformers, by losses of its own shape: (sentence_features, labels).

needs: sentence_transformers, datasets
Teacher and student are small random encoders with a vocabulary of letters: nothing is downloaded.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import pairwise_dot_score
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from distil_fast import cosine_loss, divergence_loss


class EmbeddingLoss(nn.Module):
    """EmbedDistillLoss: the mean over columns of cosine_loss or mse_loss; labels are the teacher's embeddings."""

    def __init__(self, model: SentenceTransformer, loss: Any = cosine_loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return torch.stack([self.loss(embedding, labels) for embedding in embeddings]).mean()


class ScoreLoss(nn.Module):
    """DistillKLDivLoss: KL over the candidates of a query, times T^2; labels are the teacher's scores [B, N]."""

    def __init__(self, model: SentenceTransformer, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        query, *candidates = (self.model(features)["sentence_embedding"] for features in sentence_features)
        scores = torch.stack([pairwise_dot_score(query, candidate) for candidate in candidates], 1)
        return divergence_loss(scores, labels, temperature=self.temperature, t_squared=True)


def encoder(layers: int, seed: int) -> SentenceTransformer:
    """A BERT of random weights with mean pooling."""
    torch.manual_seed(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary))
        BertTokenizer.from_pretrained(folder).save_pretrained(folder)
        BertModel(BertConfig(vocab_size=len(vocabulary), num_hidden_layers=layers, **sizes)).save_pretrained(folder)
        words = Transformer(folder, max_seq_length=32)
        return SentenceTransformer(modules=[words, Pooling(64)], device="cpu")


def main() -> None:
    teacher, student = encoder(4, seed=0), encoder(1, seed=1)
    text = [f"{a}{b} {b}{c} {c}{a}" for a in "abcdef" for b in "ghijkl" for c in "mnop"]
    data = Dataset.from_dict({"sentence": text, "label": teacher.encode(text).tolist()})
    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": 16, "num_train_epochs": 2, "learning_rate": 1e-3, "use_cpu": True}
        args = SentenceTransformerTrainingArguments(
            folder, **settings, logging_steps=9, save_strategy="no", report_to="none"
        )
        loss = EmbeddingLoss(student)
        trainer = SentenceTransformerTrainer(student, args, train_dataset=data, loss=loss)
        trainer.train()
    print([round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row])


if __name__ == "__main__":
    main()

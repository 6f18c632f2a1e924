"""Hugging Face Trainer: a callback that converts the model before training and reverts it afterwards.

What it shows: ``Trainer(callbacks=[SyncNorm()])`` on a ResNet classifier and on SegFormer, whose decode head has a
               batch norm. Both are built from a configuration with random weights: nothing is downloaded.
How to start:  torchrun --nproc-per-node 2 examples/hf_trainer.py
What it prints: for each model the mean loss of the first and last 5 steps; the difference of the running statistics
between ranks after training (large with local batch norm); the classes of its norms.
Needs: transformers, scikit-learn for its digits.
"""

import os

if "RANK" not in os.environ:
    raise SystemExit("a launcher starts this: torchrun --nproc-per-node 2 examples/hf_trainer.py")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
import transformers as hf
from sklearn.datasets import load_digits

import syncnorm
from syncnorm.integrations.huggingface import SyncNorm

sizes = {"num_channels": 1, "hidden_sizes": [8, 16], "depths": [1, 1]}
resnet = hf.ResNetConfig(**sizes, embedding_size=8, layer_type="basic", num_labels=10)
heads = {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
patches = {"patch_sizes": [3, 3], "strides": [2, 2], "num_encoder_blocks": 2}
segformer = hf.SegformerConfig(**sizes, **heads, **patches, num_labels=2)

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images[:160]).float().view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3) / 16
digits = [{"pixel_values": image, "labels": int(label)} for image, label in zip(x, labels, strict=False)]
ink = [
    {"pixel_values": image, "labels": (image[0] > 0.5).long()} for image in x
]  # (32, 32), 1 where a pixel is part of the digit
arguments = hf.TrainingArguments(
    output_dir="out",
    use_cpu=not torch.cuda.is_available(),
    per_device_train_batch_size=4,
    num_train_epochs=2,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=False,
    ddp_find_unused_parameters=False,
    average_tokens_across_devices=False,  # otherwise the Trainer multiplies the loss by the number of ranks
)
for model_class, config, data in [
    (hf.ResNetForImageClassification, resnet, digits),
    (hf.SegformerForSemanticSegmentation, segformer, ink),
]:
    torch.manual_seed(0)
    trainer = hf.Trainer(model_class(config), arguments, train_dataset=data, callbacks=[SyncNorm()])
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    mine = torch.cat([value for name, value in trainer.model.named_buffers() if "running" in name])
    dist.broadcast(first := mine.clone(), 0)
    dist.reduce(apart := (mine - first).abs().max(), 0, dist.ReduceOp.MAX)
    if trainer.is_world_process_zero():
        norms = {layer.type for layer in syncnorm.describe(trainer.model)}
        print(f"{model_class.__name__}: loss {sum(losses[:5]) / 5:.3f} to {sum(losses[-5:]) / 5:.3f},", end=" ")
        print(f"ranks apart by {apart:.1e}, {', '.join(sorted(norms))}", flush=True)
dist.destroy_process_group()

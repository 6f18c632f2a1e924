"""The monitor's numbers in Weights & Biases and MLflow, both without a server."""

import pytest
import torch
from torch import nn

from syncnorm.integrations.scalars import to_mlflow, to_wandb
from syncnorm.monitor import monitor

STEPS = (2, 4, 6)


def train(scalars, after_step=lambda step: None) -> None:
    layer = nn.BatchNorm1d(3)  # its name is that of the model
    with monitor(layer, every=2, log=None, scalars=scalars) as watch:
        for step in range(1, 7):
            layer(torch.randn(8, 3))
            after_step(step)
            watch.step()


class Run:
    """What `to_wandb` uses of ``wandb.Run``: rows grow until one is committed, as in W&B."""

    def __init__(self):
        self.rows, self.row, self.defined = [], {}, []

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def log(self, values, commit):
        self.row |= values
        if commit:
            self.rows.append(self.row)
            self.row = {}


def test_a_sampled_step_is_one_row_of_wandb():
    run = Run()
    train(to_wandb(run))
    assert run.defined == [("syncnorm/*", "syncnorm/step")]
    assert [row["syncnorm/step"] for row in run.rows] == list(STEPS)
    assert all({"syncnorm/divergence_mean/model", "syncnorm/all/buffers_differ"} <= row.keys() for row in run.rows)
    assert run.row == {}


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="test", dir=tmp_path, mode="offline") as run:
        train(to_wandb(run), after_step=lambda step: run.log({"loss": 1 / step}) if step == 5 else None)
        assert run.step == len(STEPS) + 1
        assert run.summary["syncnorm/step"] == STEPS[-1]
        assert run.summary["syncnorm/divergence_mean/model"] == 0
        assert run.summary["loss"] == 0.2


def test_mlflow_with_files(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    with mlflow.start_run() as run:
        train(to_mlflow())
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "syncnorm/divergence_mean/model")
    assert [(metric.step, metric.value) for metric in history] == [(step, 0) for step in STEPS]


def test_mlflow_allows_the_names_of_all_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    with mlflow.start_run() as run:
        to_mlflow()("syncnorm/wait_ms/norm (1)", 0.5, 1)
    assert mlflow.get_run(run.info.run_id).data.metrics == {"syncnorm/wait_ms/norm _1_": 0.5}

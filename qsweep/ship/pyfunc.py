"""A bundle as an MLflow model: MLflow runs this file where the model is loaded, so that nothing is unpickled."""

from __future__ import annotations

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class BundleModel(PythonModel):  # type: ignore[misc]  # untyped in MLflow
    """Takes an array (N, ...) or nested lists of that shape, gives an array of the model's outputs."""

    def load_context(self, context: PythonModelContext) -> None:
        from qsweep.ship import load

        self.model = load(context.artifacts["bundle"])

    def predict(self, context: PythonModelContext, model_input, params: dict[str, Any] | None = None):  # type: ignore[no-untyped-def]  # a hint would have MLflow convert the input
        import numpy

        return self.model(numpy.asarray(model_input, dtype=numpy.float32))


set_model(BundleModel())

"""A bundle as an MLflow model: MLflow runs this file where the model is loaded, so that nothing is unpickled."""

from __future__ import annotations

from typing import Any

import numpy


def register() -> None:
    """Tell MLflow what model this file is: an array (N, ...) of float32 in, for several inputs a dict of arrays, as the
    signature has them; outputs as the model gives them, as arrays."""
    from mlflow.models import set_model
    from mlflow.pyfunc.model import PythonModel, PythonModelContext

    class BundleModel(PythonModel):
        def load_context(self, context: PythonModelContext) -> None:
            from qsweep.ship import load

            self.model = load(context.artifacts["bundle"])

        def predict(  # MLflow looks up these hints among the module's globals
            self, context: Any, model_input: numpy.ndarray, params: dict[str, Any] | None = None
        ) -> Any:
            if isinstance(model_input, dict):  # of several inputs
                return self.model(model_input)
            return self.model(numpy.asarray(model_input, dtype=numpy.float32))

    set_model(BundleModel())


register()

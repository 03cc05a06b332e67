"""A bundle as an MLflow model: MLflow runs this file where the model is loaded, so that nothing is unpickled."""

from __future__ import annotations


def register() -> None:
    """Tell MLflow what model this file is: arrays (N, ...) or nested lists of that shape in, an array out."""
    from mlflow.models import set_model
    from mlflow.pyfunc.model import PythonModel, PythonModelContext

    class BundleModel(PythonModel):
        def load_context(self, context: PythonModelContext) -> None:
            from qsweep.ship import load

            self.model = load(context.artifacts["bundle"])

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow acts on hints
            import numpy

            return self.model(numpy.asarray(model_input, dtype=numpy.float32))

    set_model(BundleModel())


register()

"""This model's visual tokens are compressed by vtok, which finds the settings in vtok_config.json.

``AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`` comes through here;
``vtok.load(folder)`` does the same without remote code. Without either, the folder loads as the plain model.
"""

from transformers import PreTrainedModel


class SettingsError(Exception):
    """No ValueError: a pipeline answers those by loading the plain model without a word."""


class VtokForImageTextToText(PreTrainedModel):
    """Stands for the class that the config names: what ``from_pretrained`` gives is an instance of that one."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        try:
            from vtok.export.hf import from_auto
        except ImportError as error:
            raise ImportError(
                "this model's visual tokens are compressed by vtok, which is not installed here (or too old): "
                "pip install -U vtok. To load the plain model instead, leave trust_remote_code out."
            ) from error
        try:
            return from_auto(pretrained_model_name_or_path, *model_args, **kwargs)
        except ValueError as error:
            raise SettingsError(str(error)) from error

"""The sliders below the conversation: alpha of the patient, beta of every doctor, temperature."""

from textual import on
from textual.app import ComposeResult
from textual.containers import Grid
from textual.message import Message

from llmdoctor.errors import LLMDoctorError
from llmdoctor.tui.current_settings import CurrentSettings
from llmdoctor.tui.widgets.slider import Slider


class Sliders(Grid):
    """They change ``settings``, which hold from the next token on; as many rows as the width needs."""

    class Moved(Message):
        """A person has moved a slider, and the settings have changed."""

    def __init__(self, settings: CurrentSettings, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._settings = settings
        self.rows = 1

    def compose(self) -> ComposeResult:
        """One slider per number."""
        yield Slider("α patient", self._settings.guidance.alpha, high=2.0, id="slider-alpha")
        # The betas are numbered: a doctor's name may hold characters that an id may not.
        for number, (name, beta) in enumerate(self._settings.guidance.betas.items()):
            yield Slider(f"β {name}", beta, high=3.0, name=name, id=f"slider-beta-{number}")
        yield Slider("T temperature", self._settings.sampling.temperature, high=2.0, id="slider-temperature")

    @on(Slider.Changed)
    def _changed(self, event: Slider.Changed) -> None:
        event.stop()
        settings, slider = self._settings, event.slider
        try:
            # By id: a doctor may have the name "alpha" or "temperature".
            if slider.id == "slider-temperature":
                settings.draw(settings.sampling.replace(temperature=event.value))
            elif slider.id == "slider-alpha":
                settings.guide(settings.guidance.replace(alpha=event.value))
            else:
                betas = {**settings.guidance.betas, slider.name or "": event.value}
                settings.guide(settings.guidance.replace(betas=betas))
        except LLMDoctorError as error:
            self.notify(str(error), severity="warning", markup=False)
            self.show()
        else:
            self.post_message(self.Moved())

    def show(self) -> None:
        """Show the settings in use; posts nothing."""
        guidance, sampling = self._settings.guidance, self._settings.sampling
        for slider in self.query(Slider):
            if slider.id == "slider-temperature":
                slider.value = sampling.temperature
            else:
                slider.value = guidance.alpha if slider.id == "slider-alpha" else guidance.betas[slider.name or ""]

    def fit(self, width: int) -> None:
        """As many beside each other as ``width`` columns hold, in rows of equal length."""
        count = len(self.query(Slider))
        columns = max(1, min(count, width // (26 if width < 100 else 36)))
        self.rows = -(-count // columns)
        self.styles.grid_size_columns = -(-count // self.rows)
        self.styles.grid_size_rows = self.rows
        self.styles.height = self.rows

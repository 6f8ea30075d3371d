"""Parameters of the plot stage."""

from pydantic import Field

from gradiend_core.config.section import Section


class Plot(Section):
    """How figures are written."""

    dpi: int = Field(300, ge=50, le=1200, description="dots per inch of the PNG files")

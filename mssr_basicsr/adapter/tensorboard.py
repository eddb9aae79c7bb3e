"""What TensorBoard shows of the levels, in addition to what BasicSR writes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from basicsr.utils import tensor2img
from PIL import Image, ImageDraw
from torch import Tensor

from mssr_basicsr.adapter.records import LevelRecord, validation_sets
from mssr_basicsr.adapter.stage_options import BackwardOptions, ForwardOptions

PANEL = 192  #: pixels that a picture of a validation image has on a side, at most
LINE, CELL = 14, 44  # pixels: the height of a line of text, and the width of a number with one decimal
BLUE = (90, 160, 230)  # on which black is legible


class LevelBoard:
    """What one run shows of its levels in TensorBoard.

    BasicSR passes its writer only to validations, on rank 0 and with ``logger.use_tb_logger``, so everything is written
    there. What a run writes only once, it writes again after it is resumed.
    """

    def __init__(self, opt: Mapping[str, Any]) -> None:
        self._opt = opt
        self._charts: dict[str, Any] = {}
        self._pictures: dict[str, dict[int, dict[str, Image.Image]]] = {}
        self._num_levels = 0  # whose densities have been shown
        self._options_shown = False

    def show_result(self, writer: Any, name: str, records: Sequence[LevelRecord]) -> None:
        """The last metrics of the set ``name``, plotted over the level: once, at the end of the training."""
        for record in records:
            for metric, value in record['metrics'].get(name, {}).items():
                writer.add_scalar(f'levels/{name}/{metric}', value, record['level'])

    def show_charts(self, writer: Any, name: str, records: Sequence[LevelRecord]) -> None:
        """One chart per metric of the set ``name`` under TensorBoard's custom scalars, with one line per level.

        Its tags are those of :class:`LevelTags`; video classes omit the set's name.
        """
        charts = {}
        for metric in [metric for record in records for metric in record['metrics'].get(name, {})]:
            tags = rf'^metrics/({re.escape(name)}/)?{re.escape(metric)}_level\d+$'
            charts[f'{name} {metric}'] = ['Multiline', [tags]]
        if not charts.keys() <= self._charts.keys():
            self._charts.update(charts)
            writer.add_custom_scalars({'levels': self._charts})

    def show_pictures(
        self, writer: Any, name: str, pictures: Mapping[int, dict[str, Image.Image]], current_iter: int | str
    ) -> None:
        """One image with the levels' ``pictures`` side by side, the ground truth last, under ``validation/<set>``.

        A level that was not validated this time keeps its last picture. For a photograph, five levels and the ground
        truth add about 0.4 MB to the event file.
        """
        known = self._pictures.setdefault(name, {})
        known.update({level: of_level for level, of_level in pictures.items() if 'result' in of_level})
        panels = {f'level {level}': known[level]['result'] for level in sorted(known)}
        for of_level in known.values():
            if 'gt' in of_level:
                panels['GT'] = of_level['gt']
        if panels:
            writer.add_image(f'validation/{name}', side_by_side(panels), current_iter, dataformats='HWC')

    def show_densities(self, writer: Any, records: Sequence[LevelRecord]) -> None:
        """The share of each layer's prunable weights that levels 0, 1, ... keep, written whenever there is a new level.

        It is one image (:func:`density_table`), and one scalar per layer, over the level instead of iterations.
        """
        new = records[self._num_levels :]
        if new:
            self._num_levels = len(records)
            for record in new:
                for layer, density in record['layer_density'].items():
                    writer.add_scalar(f'layer_density/{layer}', density, record['level'])
            table = density_table([record['layer_density'] for record in records])
            writer.add_image('layer_density/percent', table, new[-1]['level'], dataformats='HWC')

    def show_options(self, writer: LevelTags, decisive: Mapping[str, Any], smallest_level: int) -> None:
        """A row in TensorBoard's HParams, once: the options in which runs differ, and their levels' last metrics.

        TensorBoard takes the columns for all runs from one of them, so each run names the options of both stages.
        """
        if self._options_shown:
            return
        self._options_shown = True
        from torch.utils.tensorboard.summary import hparams  # needs TensorBoard, which is there if the writer is

        options = {
            'network_g.backbone.type': self._opt['network_g']['backbone']['type'],
            'model_type': self._opt['model_type'],
            'base_model_type': self._opt.get('base_model_type', 'SRModel'),
            'train.optim_g.lr': self._opt.get('train', {}).get('optim_g', {}).get('lr', ''),
            **{name: str(value) for name, value in decisive.items()},
        }
        fields = (*dataclasses.fields(ForwardOptions), *dataclasses.fields(BackwardOptions))
        absent = {name: '' for name in (f'train.{field.name}' for field in fields) if name not in options}
        metrics = [
            f'{tag.replace(f"/{writer.name}/", f"/{name}/")}_level{level}'
            for name in (dataset['name'] for dataset in validation_sets(self._opt).values())
            for tag in writer.written
            if tag.rpartition('/')[2] in (self._opt['val'].get('metrics') or {})
            for level in range(smallest_level + 1)
        ]
        columns, _, _ = hparams({**options, **absent}, dict.fromkeys(metrics))
        _, begin, end = hparams(options, {})
        for summary in (columns, begin, end):
            writer.file_writer.add_summary(summary)


class LevelTags:
    """A TensorBoard writer whose tags end in the level, as in ``metrics/Set5/psnr_level2``."""

    def __init__(self, tb_logger: Any, name: str, level: int) -> None:
        self._tb_logger, self.name, self._suffix = tb_logger, name, f'_level{level}'
        self.written: list[str] = []  #: tags of scalars, without the level

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> None:
        # Where several levels are validated, the set's name has the level too.
        plain = tag.replace(f'/{self.name}{self._suffix}/', f'/{self.name}/')
        self.written.append(plain)
        self._tb_logger.add_scalar(plain + self._suffix, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tb_logger, name)


def pictures_of(visuals: Mapping[str, Any]) -> dict[str, Image.Image]:
    """The ``result`` and ``gt`` of a model class's ``get_current_visuals``, where each is a tensor of one image.

    They are cropped to at most :data:`PANEL` x :data:`PANEL` pixels at the centre, so that event files stay small.
    """
    found = {key: visuals[key] for key in ('result', 'gt') if isinstance(visuals.get(key), Tensor)}
    return {
        key: Image.fromarray(tensor2img([_middle(image)], rgb2bgr=False)).convert('RGB')
        for key, image in found.items()
        if image.dim() == 4 and image.shape[:2] in ((1, 1), (1, 3))
    }


def _middle(image: Tensor) -> Tensor:
    for dim in (-2, -1):
        size = image.shape[dim]
        image = image.narrow(dim, max(size - PANEL, 0) // 2, min(size, PANEL))
    return image


def side_by_side(panels: Mapping[str, Image.Image]) -> Any:
    """The panels, three in a row, each below its label: an RGB array, uint8."""
    width = max(panel.width for panel in panels.values())
    height = max(panel.height for panel in panels.values()) + LINE
    sheet = Image.new('RGB', (width * min(len(panels), 3), height * -(-len(panels) // 3)), 'white')
    for number, (label, panel) in enumerate(panels.items()):
        x, y = number % 3 * width, number // 3 * height
        ImageDraw.Draw(sheet).text((x + 2, y + 1), label, fill='black')
        sheet.paste(panel, (x, y + LINE))
    return np.asarray(sheet)


def density_table(densities: Sequence[Mapping[str, float]]) -> Any:
    """One row per layer, one column per level, densities in percent: an RGB array, uint8.

    A cell's blue grows with the square root of the density, so that layers of the smallest levels differ visibly.
    """
    layers = list(densities[0])
    left = 6 * max(map(len, layers)) + 6
    sheet = Image.new('RGB', (left + CELL * len(densities), LINE * (1 + len(layers))), 'white')
    draw = ImageDraw.Draw(sheet)
    for row, layer in enumerate(layers, start=1):
        draw.text((2, row * LINE + 1), layer, fill='black')
    for level, of_level in enumerate(densities):
        x = left + level * CELL
        draw.text((x + 2, 1), f'level {level}', fill='black')
        for row, layer in enumerate(layers, start=1):
            density, y = of_level[layer], row * LINE
            red, green, blue = (round(255 - (255 - full) * density**0.5) for full in BLUE)
            draw.rectangle((x, y, x + CELL - 1, y + LINE - 1), fill=(red, green, blue))
            draw.text((x + 4, y + 1), f'{density:.1%}'.rstrip('%'), fill='black')
    return np.asarray(sheet)

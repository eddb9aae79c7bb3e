"""The quickstart's result: each level's quality and size, compared with bicubic, as a table and a plot.

    python scripts/quickstart_report.py

Run it where the quickstart ran. It reads the levels.json of the forward stage (each level's own ticket) and of the test
(all levels out of the one set of weights) and writes quickstart.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from basicsr.data import build_dataset
from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img
from basicsr.utils.matlab_functions import imresize
from basicsr.utils.options import ordered_yaml
from training_logs import iteration_seconds, read_logs

from mssr_basicsr.scalable.plotting import draw_psnr, new_figure, save_figure

FORWARD = Path('experiments/mssr_forward')
TICKETS = FORWARD / 'models' / 'levels.json'
NESTED = Path('results/mssr_test/levels.json')
PLOT = Path('quickstart.png')


def bicubic(opt: dict[str, Any]) -> dict[str, float]:
    """The metrics of MATLAB's bicubic upscaling on the test set of ``opt``, by BasicSR's own protocol."""
    dataset_opt = {**opt['datasets']['test_1'], 'phase': 'test', 'scale': opt['scale']}
    for key in ('dataroot_gt', 'dataroot_lq'):
        dataset_opt[key] = str(Path(dataset_opt[key]).expanduser())
    sums = dict.fromkeys(opt['val']['metrics'], 0.0)
    dataset = build_dataset(dataset_opt)
    for i in range(len(dataset)):
        pair = dataset[i]
        upscaled = imresize(pair['lq'], opt['scale'])
        images = {'img': tensor2img(upscaled), 'img2': tensor2img(pair['gt'])}
        for name, metric in opt['val']['metrics'].items():
            sums[name] += calculate_metric(images, metric)
    return {name: value / len(dataset) for name, value in sums.items()}


def main() -> None:
    with open('options/mssr_test.yml') as file:
        opt = yaml.load(file, Loader=ordered_yaml()[0])
    dataset = opt['datasets']['test_1']['name']
    tickets = {record['level']: record for record in json.loads(TICKETS.read_text())}
    nested = json.loads(NESTED.read_text())
    base = bicubic(opt)

    print(f'PSNR (dB) and SSIM on Y of {dataset}, x{opt["scale"]}; "nested": every level out of one set of weights')
    head = ('level', 'sparsity asked', 'measured', 'parameters', 'ticket', 'nested', 'over bicubic')
    print('  '.join(f'{cell:>15}' for cell in head))
    bicubic_cells = ('bicubic', '', '', '', '', f'{base["psnr"]:.2f} / {base["ssim"]:.4f}', '')
    print('  '.join(f'{cell:>15}' for cell in bicubic_cells))
    for record in nested:
        level, metrics = record['level'], record['metrics'][dataset]
        ticket = tickets[level]['metrics'][dataset]
        cells = [str(level), f'{opt["network_g"]["sparsity"][level]:.2%}', f'{record["sparsity"]:.3%}']
        cells += [f'{record["parameters"]:,}', f'{ticket["psnr"]:.2f} / {ticket["ssim"]:.4f}']
        cells += [f'{metrics["psnr"]:.2f} / {metrics["ssim"]:.4f}', f'{metrics["psnr"] - base["psnr"]:+.2f} dB']
        print('  '.join(f'{cell:>15}' for cell in cells))
    total, data = (1000 * seconds for seconds in iteration_seconds(read_logs(FORWARD)))
    print(f'An iteration of the forward stage took {total:.0f} ms, {data:.0f} ms of them waiting for data.')

    figure, axes = new_figure(figsize=(6.4, 4))
    sizes = [record['parameters'] for record in nested]
    own = [tickets[record['level']] for record in nested]
    lines = {
        label: [(record['parameters'], record['metrics'][dataset]['psnr']) for record in records]
        for label, records in (('tickets (one network each)', own), ('nested', nested))
    }
    draw_psnr(axes, lines, 'parameters', {'tickets (one network each)': 'o--', 'nested': 's-'})
    axes.axhline(base['psnr'], color='grey', linestyle=':', label='bicubic')
    axes.set_ylabel(f'PSNR on Y of {dataset} (dB)')
    axes.set_xticks(sizes, [f'{size / 1000:.0f}k' for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_title(f'{opt["network_g"]["backbone"]["type"]} x{opt["scale"]}: five networks in one')
    axes.legend()
    save_figure(figure, PLOT)
    print(f'Plot: {PLOT}')


if __name__ == '__main__':
    main()

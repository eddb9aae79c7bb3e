"""The study: its report matches its results, and its runs are accepted before hours are spent on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from basicsr.models import build_model
from conftest import parsed, pruned_mssr, save_as_forward_stage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts' / 'study'))

import report  # noqa: E402
import runs  # noqa: E402
import study  # noqa: E402


def test_the_report_is_made_from_the_results() -> None:
    assert report.report(study.read_results()) == (ROOT / 'docs' / 'results.md').read_text('utf-8')


def test_every_table_of_the_report() -> None:
    """Once all has been run, each network has a row, with NIQE in place of SSIM for a GAN."""
    metrics = {name: {'psnr': 30.0, 'psnr_rounded': 29.9, 'ssim': 0.9, 'niqe': 5.0} for name in report.SETS}
    levels = [
        {'level': level, 'parameters': 1000, 'iterations': 10, 'metrics': metrics, 'evaluation': 'published'}
        for level in range(5)
    ]
    done = {
        'seed': 1,
        'threads': 1,
        'iterations': 50,
        'command': 'study.py',
        **dict.fromkeys(('seconds', 'seconds_per_iteration', 'data_seconds_per_iteration'), 1),
        'levels': levels,
        'tickets': levels,
    }
    text = report.report(dict.fromkeys(runs.RUNS, done))
    assert 'All have been run.' in text
    assert '| **longer, all levels in one set of weights**, level 3, seed 1 | 1,000 | 10 | 30.00 |' in text
    assert '| **a tenth, all levels in one set of weights**, level 4 |' in text
    (head, *_) = [line for line in text.partition('## A GAN')[2].splitlines() if line.startswith('| network')]
    assert head == '| network | parameters | iterations | PSNR Set5 | Set14 | BSD100 | NIQE Set5 | Set14 | BSD100 |'


def test_the_targets_are_judged() -> None:
    """Two seeds whose levels are 0.2 dB apart, the second 0.1 dB ahead of the first; a ticket is 0.06 dB ahead."""

    def levels(ahead: float) -> list[dict[str, Any]]:
        published = report.PUBLISHED['FSRCNN'].psnr
        return [
            {
                'level': level,
                'parameters': 12_911,
                'metrics': {
                    name: {'psnr': fsrcnn + 0.15 + 0.2 * (4 - level) + ahead, 'psnr_rounded': fsrcnn + ahead}
                    for name, fsrcnn in zip(report.SETS, published)
                },
            }
            for level in range(5)
        ]

    tickets = levels(0)
    tickets[2]['metrics']['Set14']['psnr'] += 0.06
    first = report.targets({'long_backward_seed1': {'levels': levels(0), 'tickets': tickets}}).splitlines()
    assert 'over FSRCNN (12,000, trained on 91 + General-100) by 0.1 dB on all three sets: missed' in first[0]
    assert '+0.15 / +0.15 / +0.15 dB, or +0.00 / +0.00 / +0.00 dB with Y rounded' in first[0]
    assert 'missed by 1; the largest deficit is 0.060 dB, the mean difference -0.004 dB' in first[2]
    assert 'more than 0 dB (one seed) on each set: met by all; the smallest step is +0.200 dB' in first[3]
    assert 'at least 37.60 dB on Set5: met, with 37.95 dB' in first[4]
    both = report.targets(
        {f'long_backward_seed{seed}': {'levels': levels(0.1 * seed), 'tickets': levels(0)} for seed in (1, 2)}
    ).splitlines()
    assert 'by 0.1 dB on all three sets: met. The difference is +0.25' in both[0]
    assert 'seeds, 0.100 dB, on each set: met by all; the smallest step is +0.200 dB' in both[6]


def test_what_basicsr_measured_is_corrected() -> None:
    """The nested model's smallest level is its ticket: measured anew, and by BasicSR's metrics with the correction."""
    kept = study.read_results()
    corrected = report.psnr_by_level(report.as_published(kept)['main_forward']['levels'])[4]
    (ticket,) = [record for record in kept['main_forward']['levels'] if record['level'] == 4]
    (anew,) = [record for record in kept['main_backward_teacher']['levels'] if record['level'] == 4]
    assert (ticket['evaluation'], anew['evaluation']) == ('basicsr', 'published')
    assert corrected == pytest.approx({name: found['psnr'] for name, found in anew['metrics'].items()}, abs=2e-3)
    assert ticket['metrics']['Set14']['psnr'] == pytest.approx(corrected['Set14'] + 1.3219 / 14, abs=1e-4)


def test_the_readmes_headline_is_in_the_results() -> None:
    results = report.as_published(study.read_results())
    expected = {
        f'level {level}': ' / '.join(f'{psnr[name]:.2f}' for name in report.SETS)
        for level, psnr in report.psnr_by_level(results['main_backward_teacher']['levels']).items()
    }
    lines = (ROOT / 'README.md').read_text('utf-8').splitlines()
    for level, psnr in expected.items():
        assert any(f'{level} |' in line and f'| {psnr} |' in line for line in lines), (level, psnr)
    for run in ('srvgg_backward', 'x4_backward'):
        others = report.psnr_by_level(results[run]['levels'])
        for level in (4, 0):
            assert ' / '.join(f'{others[level][name]:.2f}' for name in report.SETS) in ' '.join(lines)


@pytest.mark.slow
@pytest.mark.parametrize('name', runs.RUNS)
def test_a_run_is_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options, with the files that it needs from other runs, make a model that is ready to train."""
    monkeypatch.chdir(tmp_path)
    run = runs.RUNS[name]
    options = runs.options_of(run)
    start = options['path'].get('pretrain_network_g')
    if start:
        Path(start).parent.mkdir(parents=True)
        network_g = {key: value for key, value in options['network_g'].items() if key not in ('type', 'level')}
        save_as_forward_stage(pruned_mssr(**network_g), Path(start))
    Path('run.yml').write_text(yaml.safe_dump(options))
    opt = parsed(Path('run.yml'), tmp_path)
    model = build_model(opt)
    total_iter = (
        sum(training.num_iter for training in model.plan.trainings)
        if hasattr(model, 'plan')
        else opt['train']['total_iter']
    )
    assert total_iter == options['train']['total_iter']


def test_a_repeated_run_keeps_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, 'RESULTS', tmp_path / 'results.json')
    experiment = tmp_path / 'experiments' / 'main_forward'
    (experiment / 'models').mkdir(parents=True)
    (experiment / 'train_main_forward_20260101.log').write_text(
        '2026-01-01 00:00:00,000 INFO: Start\n'
        '2026-01-01 00:01:00,000 INFO: [eta: 1:00:00, time (data): 0.060 (0.002)]\n'
        '2026-01-01 00:01:30,000 INFO: [eta: 1:00:00, time (data): 0.040 (0.004)]\n'
    )
    for psnr in (30.0, 31.0, 32.0):
        records = [{'level': 0, 'metrics': {'Set5': {'psnr': psnr}}}]
        (experiment / 'models' / 'levels.json').write_text(json.dumps(records))
        study.keep(runs.RUNS['main_forward'])
    last, *before = report.runs_of(study.read_results(), 'main_forward')
    assert [report.psnr_by_level(run['levels'])[0]['Set5'] for run in (last, *before)] == [32, 31, 30]
    assert [last[key] for key in ('seconds', 'seconds_per_iteration', 'data_seconds_per_iteration')] == [
        90,
        0.05,
        0.003,
    ]

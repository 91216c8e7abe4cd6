"""The demo ends where it says: the forget authors are gone and the others are not."""

import json

from llm_unlearn.cli.demo import main, table


def test_demo(tmp_path, capfd):
    assert main(["--output_dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["before"]["forget/probability"] > 0.9 and result["before"]["retain/probability"] > 0.9
    assert result["after"]["forget/probability"] < 0.1
    assert result["after"]["retain/probability"] > 0.8
    assert result["before"]["holdout/probability"] < 0.1
    shown = capfd.readouterr().out
    assert shown.count("$ python run_unlearn.py --unlearn_method") == 2
    assert table(result["before"], result["after"]) in shown

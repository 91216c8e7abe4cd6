"""Is it really gone? Attacks on checkpoints, and what they say together.

audit.py           runs the stages that audit_plan.py lists for a preset; verdict.py judges what they found
tampering.py       relearning and tampering: sweeps.py, attack_data.py, training_flags.py say what is run, finetuning.py
                   trains, curve.py and attack_state.py follow and resume it, recovery.py measures
downstream.py      the same training on unrelated tasks: downstream_tasks.py, task_accuracy.py, task_vectors.py
ablation.py        a method without its retain term: ablation_runs.py
quantize.py        the checkpoint in 8 and 4 bit
sampling.py        samples of forgotten answers: leak_prompts.py asks, leakage.py holds the estimators, leak_results.py
white_box.py       a look inside: logit_lens.py, layer_probes.py, patching.py, on the states of answer_states.py
scoring.py         scores a model in memory while an attack changes it
parsing.py         command lines; records.py and curve_files.py: what is written
"""

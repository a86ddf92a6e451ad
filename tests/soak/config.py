"""The runs of the soak test: the arithmetic task on a fleet (":fleet"), and a run with the embedded
sampler that ends and is the same in every repetition (":alone")."""

from configs import arithmetic, common

SIZES = {
    "group_size": 4,
    "groups_per_step": 8,
    "data.train_size": 4000,
    "data.validation_size": 8,
    "data.test_size": 16,
    "warmup.num_steps": 40,
    "warmup.batch_size": 16,
    "warmup.demonstrations": 640,
    "lag.steps": 8,
    "buffer.zero_variance": "keep",
    "rollout.max_zero_reward_groups": 0,
    "rollout.deadline": 200.0,
    "evaluation.n": 4,
    "evaluation.ks": (1, 4),
}
ALONE = {
    "num_steps": 60,
    "rollout.prompts_per_call": 6,  # so that groups are left over at a checkpoint
    "rollout.max_sequences": 24,
    "evaluation.every": 20,
    "checkpoint.every": 7,
}
FLEET = {
    "num_steps": 10**6,
    "evaluation.every": 0,
    "checkpoint.every": 10,
    "checkpoint.keep": 3,
    "rollout.overlap": True,
    "rollout.record": True,  # groups, whose versions are verified at the end
    "fleet.poll_every": 1.0,
    "fleet.max_in_flight": 16,
    "fleet.backoff_limit": 5.0,
    "fleet.health_every": 2.0,
    "fleet.control_deadline": 15.0,
    "fleet.request_deadline": 60.0,
    "fleet.drain_deadline": 15.0,
    "fleet.update_deadline": 45.0,
    "fleet.start_deadline": 180.0,
    "fleet.no_server_deadline": 180.0,
}
PROBLEMS = {
    "kind": "table",
    "path": "tests/soak/problems.jsonl",
    "files": (),
    "rows": 24,
    "part": (0, 100),
    "options": {
        "task": "chain_sum",
        "columns": {"problem": "question", "answer": "target"},
        "max_tests": 0,
    },
}


def get_config(arg: str) -> common.Config:
    config = arithmetic.get_config()
    config.update_from_flattened_dict({**SIZES, **{"alone": ALONE, "fleet": FLEET}[arg]})
    with config.unlocked():
        config.benchmarks.problems = PROBLEMS
    return config.lock()

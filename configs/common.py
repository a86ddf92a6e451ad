"""Shared by the configurations: the argument after the colon, and common sections."""

from typing import Any, TypeAlias

from ml_collections import ConfigDict

Config: TypeAlias = Any  # a ConfigDict, whose attributes have no static types


def parse_arg(arg: str | None, **choices: tuple[str, ...]) -> dict[str, str]:
    """Reads "task=chain_sum,objective=grpo", or values alone, "chain_sum,grpo"; the first of
    `choices` is the default.

    Raises:
      ValueError: for a name or a value that is not offered.
    """
    chosen = {name: values[0] for name, values in choices.items()}
    for part in (arg or "").split(","):
        if not part:
            continue
        name, equals, value = part.partition("=")
        if not equals:  # a value alone: the choice that offers it
            name, value = next((n for n, values in choices.items() if part in values), ""), part
        if name not in choices or value not in choices[name]:
            offered = "; ".join(f"{n}={'|'.join(v)}" for n, v in choices.items())
            raise ValueError(f"--config=...:{arg} is not offered here; choose among {offered}")
        chosen[name] = value
    return chosen


def reference(section: Config, name: str) -> Any:
    """The value of another setting, which it follows when that one is overridden."""
    return section.get_oneway_ref(name)


def fleet() -> Config:
    """Servers that sample instead of the embedded decoder; name them in one of three ways."""
    return ConfigDict(
        dict(
            servers=(),  # URLs: --config.fleet.servers="('http://10.0.0.2:30000',)"
            servers_file="",  # or a file with one URL a line, read again every poll_every
            router="",  # or a sglang-router, whose GET /workers is the list
            api_key_file="",  # file with the key of servers that were started with --api-key
            fetch_port=0,  # of the fetcher beside each server, for versions in a bucket
            poll_every=5.0,  # seconds between two looks at servers_file or router
            max_in_flight=64,  # groups requested at a time, over all servers
            attempts=4,  # of a group that fails; then it is dropped and counted
            backoff=0.5,  # seconds before a failed server is tried again; doubles each time ...
            backoff_limit=30.0,  # ... up to this
            health_every=10.0,  # seconds between two looks at a server that serves
            connect_deadline=5.0,  # seconds to open a connection
            control_deadline=30.0,  # seconds for a control call: health, admission, probe, flush
            request_deadline=1800.0,  # seconds for the rollouts of one group
            drain_deadline=300.0,  # seconds for groups in flight before a refresh; then aborted
            update_deadline=600.0,  # seconds to load a version (the restart proxy restarts)
            start_deadline=600.0,  # seconds for a server to answer at all
            no_server_deadline=1200.0,  # seconds that training pauses with no server; then code 3
            refresh_fraction=0.5,  # of the servers refreshed at a time, at least one
            # Nats between learner and server on a version's probe, by publish_dtype.
            probe_tolerance=dict(float32=1e-3, bfloat16=0.3),
            mixed_versions="reissue",  # a response of two versions: or "keep", as of the older
        )
    )


def lora() -> dict[str, Any]:
    """Adapters, trained in the place of all weights if their rank is not 0: docs/lora.md."""
    return dict(
        rank=0,
        alpha=32.0,
        targets=(
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
        merged=False,  # publish merged weights too, for servers that take no adapters
    )


def embedded() -> dict[str, Any]:
    """Devices of the embedded sampler, in the section `rollout`."""
    return dict(
        tokens_per_round=16,  # decoded between two exchanges with the host
        # Chips of each host for the sampler alone, beside the learner's, with overlap=True; 0: it
        # shares the learner's.
        devices=0,
        # More `tensor` for a model that is too large for a chip; it must divide the key heads.
        mesh=dict(data=-1, fsdp=1, tensor=1),
    )


def tracking() -> Config:
    """Trackers of metrics beside metrics.jsonl."""
    return ConfigDict(
        dict(
            tensorboard=True,
            wandb="off",  # "online" or "offline": pip install --editable '.[wandb]'
            project="oapl_jax",  # of Weights & Biases
        )
    )


def recorded() -> dict[str, Any]:
    """Groups from a recorded dataset in place of sampled ones, or beside them; and recording."""
    return dict(
        source="live",  # "dataset": recorded groups only, nothing is sampled; "both"
        dataset="",  # directory of a recorded dataset: by oapl_jax.record, or rollouts/ of a run
        dataset_share=0.5,  # of the groups of a step, for source="both"
        dataset_order="shuffled",  # endless; "recorded": in the order of the dataset, once
        dataset_version=0,  # in this run, which starts from these weights; -1: as recorded
        record=False,  # whether all live groups are written to rollouts/ in the workdir
        keep=0.1,  # or a share of them, for oapl_jax.report: about three of a step's 32
        groups_per_shard=1024,  # of record; a shard also ends with each checkpoint
    )


def curriculum() -> Config:
    """The curriculum, a choice of the prompts drawn; "window" takes rates and window, and so on."""
    return ConfigDict(
        dict(
            # "uniform": all of them; or "window", "learnability", "actor_curator".
            name="uniform",
            # Drawn for each rollout.prompts_per_call that are sampled. 2,048 is arXiv 2602.20532's:
            # with a few hundred, actor_curator soon knows only some of the prompts.
            candidates=2048,
            # No more prompts than carry this probability are chosen by it; the others uniformly.
            top_p=0.9,  # arXiv 2602.20532
            # Pass rates, of window and learnability: all our choice.
            rates=dict(
                decay=0.5,  # of what is known of a prompt, at each of its groups
                prior_rate=0.5,  # of a prompt never sampled ...
                prior_count=1.0,  # ... which weighs as much as this many responses
            ),
            # Bounds of arXiv 2502.01456; the weight, beside 1 for a prompt within, is our choice.
            window=dict(low=0.2, high=0.8, outside=0.02),
            # arXiv 2602.20532 has dormant, warmup, temperature and clip, and as its curator a
            # Qwen3-0.6B, trained at 1e-6; the other values are our choice.
            curator=dict(
                path="",  # a checkpoint with the policy's vocabulary; "": fresh, of this shape
                architecture=dict(
                    model_type="qwen3",
                    hidden_size=64,
                    intermediate_size=192,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=16,
                    max_position_embeddings=64,
                    rms_norm_eps=1e-6,
                    rope_theta=10000.0,
                    tie_word_embeddings=True,
                ),
                dtype="float32",
                remat="none",
                dormant=20,  # gradient steps without it ...
                warmup=5,  # ... and then those that train it while prompts are still all sampled
                temperature=1.0,
                clip=0.2,
                passes=1,  # gradient steps of its own on each choice that was trained on
                rows=32,  # candidates of one of its forward passes
                optim=dict(
                    learning_rate=3e-3,
                    warmup_steps=0,
                    final_fraction=1.0,
                    b1=0.9,
                    b2=0.95,
                    eps=1e-8,
                    weight_decay=0.0,
                    max_grad_norm=1.0,
                    mu_dtype="float32",
                ),
            ),
        )
    )


JUDGE_TEMPLATE = """\
Compare two responses to a task.

Task:
{prompt}

Response A:
{first}

Response B:
{second}

{question} Answer with one letter, A or B, and nothing else."""


def preferences(objective: str) -> Config:
    """Rewards by comparison with the reference policy's responses, in the place of a verifier's.

    Groups from a recorded dataset keep the rewards that they were recorded with.
    """
    return ConfigDict(
        dict(
            # "none": the verifier; "rubric", "language_model" or "callable", with its section.
            judge="rubric" if objective == "prosper" else "none",
            # arXiv 2602.19041 has both; their values are not known: these are our choice.
            beta=0.25,  # of the adversary's entropy
            comparators=8,  # responses of the reference policy to each prompt
            # A dataset of them by oapl_jax.record; "": version 0, by the embedded decoder.
            dataset="",
            # Objective -> rule -> its vote. The second one is cyclic.
            rubric=dict(
                objectives=dict(
                    right=dict(right=1.0), manner=dict(short=1.0, varied=1.0, rising=1.0)
                )
            ),
            callable=dict(
                function="",  # "package.module:name", see oapl_jax/preferences/judges.py
                objectives=(),  # names of what it compares by
            ),
            language_model=dict(
                servers=(),  # URLs of SGLang servers with fixed weights
                api_key_file="",  # file with their key, if they were started with --api-key
                tokenizer="",  # directory of the judge's own
                chat=dict(enable_thinking=False),  # for its chat template
                template=JUDGE_TEMPLATE,
                questions=dict(better="Which response is better?"),  # by objective
                verdicts=dict(A=1.0, B=0.0),  # tokens, and how far the first response is better
                min_verdict_mass=0.5,  # of all verdicts; with less there is no score
                max_prompt_tokens=4096,  # arXiv 2602.19041; a longer question is not asked
                questions_per_request=8,
                max_in_flight=32,  # requests at a time, of one group
                connect_deadline=5.0,  # seconds to open a connection
                request_deadline=60.0,  # seconds for a request
                backoff=0.5,  # seconds before a failed request goes to the next server; doubles
                group_deadline=300.0,  # seconds for a group, below rollout.deadline
            ),
        )
    )


def rewards() -> Config:
    """A reward function, or verifiers with processes of their own; each opens for the first prompt
    of its task."""
    return ConfigDict(
        dict(
            # "my_module:reward", in the place of the task's verifier: docs/own-task.md
            function="",
            function_pool=dict(
                processes=2,
                seconds=10.0,  # a call; after them its process is killed
                memory_bytes=4 << 30,  # of a process, beyond its imports
            ),
            math=dict(
                processes=2,
                seconds=5.0,  # an answer; after them its process is killed
                recycle_after=1000,  # answers; then a process makes room for a new one
                memory_bytes=1 << 30,  # of a process
                thinking_opened=False,  # whether the chat template itself writes <think>
            ),
            code=dict(
                allow_unsafe=False,  # run programs on a machine that can't isolate them
                parallel=2,  # programs at a time; no more than there are cores
                seconds_per_test=6.0,  # arXiv 2602.19362's released code
                memory_bytes=1 << 30,  # of a program
                processes=16,  # threads of a program
                output_bytes=16 << 20,  # of a test
                temporary_bytes=256 << 20,  # files of a program
                max_tests=0,  # of a problem, the longest ones; 0 for all
                thinking_opened=False,
                packages=("numpy",),  # that a program may import beside the standard library
                prelude="livecodebench",  # "oapl": also np, os, io, and pd with pandas in packages
                start_seconds=60.0,  # for a sandbox to come up
                cache_entries=100_000,  # verdicts kept, by content
            ),
            # arXiv 2603.01840 has the four terms; all of these values are our choice.
            documents=dict(
                weights=dict(syntax=0.25, closure=0.25, table=0.25, text=1.0),
                plain_formula=0.2,  # a valid formula without the reference's commands, within -1, 1
                per_open_tag=0.1,  # off the term of closure, which is at least -1
                max_characters=8192,  # of a response; a longer one is worth nothing
            ),
        )
    )


def release(root: Any, kind: str, path: str, *files: str, rows: int, **options: Any) -> Config:
    """A public release in the layout of docs/data.md, below `root`, which it follows."""
    return ConfigDict(
        dict(
            kind=kind,
            path=root + f"/{path}",
            files=files,
            rows=rows,  # that the files must have; 0: any number
            part=(0, 100),  # hundredths of the space of all problems
            options=options,
        )
    )


def no_warmup(config: Config) -> Config:
    """Disables the warm-up, for pretrained models; keeps the run's optimizer settings for it."""
    return ConfigDict(
        dict(num_steps=0, noise=0.0, batch_size=64, demonstrations=1, optim=config.optim.to_dict())
    )


def smoke(config: Config) -> None:
    """Shrinks a run of the paper to a fresh tiny decoder and made-up releases, for two CPU cores.

    The releases are those of `python -m oapl_jax.data.samples --to=runs/samples --rows=8`, and the
    warm-up teaches their solutions, so that some responses are right.
    """
    config.releases = "runs/samples"
    for name in config.data.sets:
        config.data.sets[name].rows = 0
    for name in config.benchmarks:
        config.benchmarks[name].rows = 0
    config.group_size, config.groups_per_step = 8, 8
    config.model = dict(
        path="",
        architecture=dict(
            model_type="qwen3",
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            tie_word_embeddings=True,
        ),
        dtype="float32",
        remat="none",
        lora=lora(),
    )
    config.mesh.fsdp = -1
    config.publish_dtype = "float32"
    config.publish_full_every = 1
    config.optim.update(learning_rate=1e-4, warmup_steps=0, max_grad_norm=1.0, eps=1e-8)
    config.warmup.update(batch_size=16)
    config.warmup.optim.update(config.optim.to_dict() | dict(learning_rate=6e-3, warmup_steps=20))
    config.rollout.update(
        sampler="local", overlap=False, prompts_per_call=8, max_sequences=64, reward_threads=2
    )
    config.buffer.capacity = 32
    config.learner.update(micro_batches=8, rows_multiple=8, logp_chunk=64)
    config.rewards.math.update(processes=2, thinking_opened=False)
    config.rewards.code.update(parallel=2, thinking_opened=False)
    config.evaluation.update(every=4, n=4, ks=(1, 4), resamples=200)
    config.checkpoint.update(every=4, keep=9)

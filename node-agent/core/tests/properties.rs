//! Whatever happens in whatever order, the shared rules hold; and once the world behaves again,
//! what is wanted is what is.

mod common;

use common::{World, assignment, copy, id};
use proptest::prelude::*;
use towline_node_core::{Gate, Input};
use towline_proto::v1::{Desired, Phase};

#[derive(Debug, Clone)]
enum Act {
    Want { n: u8, epoch: u64, generation: u64, desired: Desired },
    Answer { index: usize, well: bool },
    Die(u8),
    Tick(u64),
    Cut,
    Connect,
    Restart,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let desired = prop_oneof![
        4 => Just(Desired::Running),
        2 => Just(Desired::Stopped),
        2 => Just(Desired::Paused),
        1 => Just(Desired::Deleted),
    ];
    let act = prop_oneof![
        4 => (1..4u8, 1..3u64, 1..8u64, desired).prop_map(|(n, epoch, generation, desired)| {
            Act::Want { n, epoch, generation, desired }
        }),
        12 => (0..8usize, prop::bool::weighted(0.8))
            .prop_map(|(index, well)| Act::Answer { index, well }),
        1 => (1..4u8).prop_map(Act::Die),
        2 => (0..200u64).prop_map(Act::Tick),
        1 => Just(Act::Cut),
        1 => Just(Act::Connect),
        1 => Just(Act::Restart),
    ];
    prop::collection::vec(act, 0..120)
}

fn act(world: &mut World, act: Act) {
    match act {
        Act::Want { n, epoch, generation, desired } => {
            // The third is a copy.
            let of = if n == 3 { copy } else { assignment };
            world.want(of(n, epoch, generation, desired));
        }
        Act::Answer { index, well } if !world.waiting.is_empty() => {
            world.answer(index % world.waiting.len(), well);
        }
        Act::Answer { .. } => {}
        Act::Die(n) => {
            world.halted.remove(&id(n));
            if world.alive.remove(&id(n))
                && let Some(run) = world.core.run(id(n))
            {
                let reason = "killed".into();
                world.input(Input::VmExited { sandbox: id(n), run, reason });
            }
        }
        Act::Tick(seconds) => {
            world.now += std::time::Duration::from_secs(seconds);
            world.input(Input::Tick);
        }
        Act::Cut => world.cut(),
        Act::Connect => world.connect(),
        Act::Restart => world.restart(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rules_hold_and_the_world_converges(acts in acts(), last in prop::sample::subsequence(vec![1u8, 2, 3], 0..=3)) {
        let mut world = World::new();
        world.connect();
        acts.into_iter().for_each(|one| act(&mut world, one));

        world.committed.clear();
        world.connect();
        for &n in &last {
            let of = if n == 3 { copy } else { assignment };
            world.want(of(n, 9, 9, if n == 2 { Desired::Paused } else { Desired::Running }));
        }
        world.bookmark();
        world.settle_with_time();
        let here: Vec<_> = world.core.sandboxes().collect();
        let wanted: Vec<_> = last.iter().map(|&n| id(n)).collect();
        prop_assert_eq!(&here, &wanted);
        for &n in &last {
            prop_assert_eq!(world.phase(n), world.core.observed(id(n)).map(|fact| fact.phase()));
            let phase = world.phase(n).unwrap();
            // One that was being removed when it was wanted again has lost its disk, and says so.
            let wanted = if n == 2 { Phase::Paused } else { Phase::Running };
            let lost = phase == Phase::Failed && world.reason(n).contains("removed")
                || n == 3 && phase == Phase::Failed && world.reason(n).contains("fork again")
                // What has ended cannot be paused.
                || n == 2 && matches!(phase, Phase::Stopped | Phase::Failed);
            prop_assert!(phase == wanted || lost, "{phase:?} {}", world.reason(n));
            prop_assert_eq!(world.alive.contains(&id(n)), phase == wanted);
            prop_assert_eq!(world.halted.contains(&id(n)), phase == Phase::Paused);
            let open = world.gates.get(&id(n)) == Some(&Gate::Open { epoch: 9 });
            prop_assert_eq!(open, phase == Phase::Running);
        }
        // Nothing is kept that no copy waits for.
        prop_assert_eq!(world.forks.as_ref().map(|forks| forks.len()), Some(0));
        prop_assert!(world.disk.keys().all(|id| wanted.contains(id)));
    }
}

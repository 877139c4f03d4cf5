//! What placement chooses, and what its refusals say.

use towline_proto::v1::{Capacity, Driver, Node, NodeRecord};

use super::*;

fn node(n: u8, cpus: u32, memory_gib: u64, embedded: bool) -> NodeRecord {
    let driver =
        Driver { name: "qemu".into(), isolation: Isolation::Vm.into(), ..Default::default() };
    let node = Node {
        id: vec![n; 16],
        name: format!("n{n}"),
        epoch: 1,
        state: NodeState::Ready.into(),
        capacity: Some(Capacity {
            cpus: cpus * 8,
            memory_mib: memory_gib << 10,
            disk_mib: 100 << 10,
        }),
        drivers: vec![driver],
        machine_cpus: cpus,
        embedded,
        ..Default::default()
    };
    NodeRecord { node: Some(node), ..Default::default() }
}

fn nodes(records: Vec<NodeRecord>) -> Nodes {
    let mut nodes = Nodes::default();
    for record in records {
        nodes.insert(record).unwrap();
    }
    nodes
}

fn want(memory_gib: u64) -> Want {
    let shape = v1::Shape { memory_mib: memory_gib << 10, ..Default::default() };
    Want { shape, isolation: Isolation::Vm, local_image: false }
}

fn why(nodes: &Nodes, want: &Want) -> String {
    place(nodes, &BTreeMap::new(), want).unwrap_err().message
}

#[test]
fn the_fullest_node_with_room_is_chosen_and_the_shape_completed() {
    let nodes = nodes(vec![node(1, 8, 64, false), node(2, 2, 16, false), node(3, 8, 8, false)]);
    let placed = place(&nodes, &BTreeMap::new(), &want(12)).unwrap();
    assert_eq!(placed.node, NodeId::from_bytes([2; 16]));
    assert_eq!(placed.shape.cpus, 2);
    assert_eq!(placed.shape.disk_mib, DEFAULT_DISK_MIB);
}

#[test]
fn what_is_in_flight_counts() {
    let nodes = nodes(vec![node(1, 8, 16, false)]);
    let flying = Resources { memory_mib: 10 << 10, ..Default::default() };
    let in_flight = BTreeMap::from([(NodeId::from_bytes([1; 16]), flying)]);
    assert!(place(&nodes, &in_flight, &want(8)).is_err());
    assert!(place(&nodes, &in_flight, &want(6)).is_ok());
}

#[test]
fn a_refusal_names_the_largest() {
    let nodes = nodes(vec![node(1, 8, 16, false), node(2, 8, 18, false)]);
    let message = why(&nodes, &want(64));
    assert!(
        message.starts_with("no node has 64 GiB of memory free; the largest has 18 GiB on node_")
    );
    assert!(message.ends_with("ask for at most 18 GiB"), "{message}");
}

#[test]
fn other_refusals_have_their_reasons() {
    let mut one = node(1, 2, 16, false);
    assert!(why(&nodes(vec![]), &want(1)).contains("no node yet"));
    let local = Want { local_image: true, ..want(1) };
    assert!(why(&nodes(vec![one.clone()]), &local).contains("needs a node on this machine"));
    let wide = v1::Shape { cpus: 9, ..Default::default() };
    let wide = Want { shape: wide, ..want(1) };
    assert!(why(&nodes(vec![one.clone()]), &wide).contains("the largest has 2"));
    one.node.as_mut().unwrap().set_state(NodeState::Suspect);
    assert!(why(&nodes(vec![one.clone()]), &want(1)).contains("is silent"));
    one.node.as_mut().unwrap().set_state(NodeState::Ready);
    one.node.as_mut().unwrap().drivers.clear();
    assert!(why(&nodes(vec![one]), &want(1)).contains("no node has a driver"));
}

#[test]
fn process_sandboxes_go_only_where_they_are_allowed() {
    let process = Want { isolation: Isolation::Process, ..want(1) };
    let mut allows = node(2, 2, 64, false);
    let driver = Driver {
        name: "process".into(),
        isolation: Isolation::Process.into(),
        ..Default::default()
    };
    let none = nodes(vec![node(1, 8, 8, false), allows.clone()]);
    let why = why(&none, &process);
    assert!(why.contains("no node allows it") && why.contains("of `n1`, `n2`"), "{why}");
    assert!(why.contains("isolation_process = true"), "{why}");

    allows.node.as_mut().unwrap().drivers.push(driver);
    let some = nodes(vec![node(1, 8, 8, false), allows]);
    let placed = place(&some, &BTreeMap::new(), &process).unwrap();
    assert_eq!(placed.node, NodeId::from_bytes([2; 16]), "the fuller node does not allow it");
    assert_eq!(place(&some, &BTreeMap::new(), &want(1)).unwrap().node, NodeId::from_bytes([1; 16]));
}

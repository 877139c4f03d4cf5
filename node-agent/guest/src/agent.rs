//! The guest agent's life: one session of the guest link after another, over state that outlives
//! them: whether it was configured, its execs, the local image's requests, the network's names.
//!
//! A session opens the control stream, serves the node's streams, asks outstanding requests of the
//! local image again, and takes the workload's connections. Execs know nothing of sessions.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1::{
    Became, Become, Freeze, Frozen, GuestCommand, GuestConfigure, GuestConfigured, GuestHello,
    Shutdown, StreamErrorCode, StreamOpen, guest_command::Command, guest_event::Event,
    stream_open::Kind,
};
use towline_streams::{
    FrameReader, FrameWriter, GuestSession, GuestSessions, Marker, MuxHandle, MuxRecv, MuxSend,
    Priority,
};

use crate::boot::Kernel;
use crate::configure::{configure, set_clock};
use crate::fork;
use crate::fuse;
use crate::net::Network;
use crate::refusal::Refusal;
use crate::serve::{Services, serve};
use crate::shutdown::shut_down;

/// Unconfigured -> Configuring -> Ready or Failed. A failed guest is of no use but to say why.
#[derive(Debug, Clone)]
enum Stage {
    Unconfigured,
    Configuring,
    Ready(Arc<Services>),
    Failed(Refusal),
}

struct Agent {
    kernel: Kernel,
    stage: watch::Sender<Stage>,
    local_image: watch::Sender<Option<Arc<fuse::Requests>>>,
    set_marker: Box<dyn Fn(Marker) + Send + Sync>,
    /// The workload is frozen.
    frozen: AtomicBool,
    /// Freezing, thawing and becoming are done one after another, in the order of their commands.
    copying: tokio::sync::Mutex<()>,
}

/// Serves sessions until the link itself breaks.
pub async fn run(mut sessions: GuestSessions, kernel: Kernel, network: Network) {
    let agent = Arc::new(Agent {
        kernel,
        stage: watch::Sender::new(Stage::Unconfigured),
        local_image: watch::Sender::new(None),
        set_marker: Box::new(sessions.marker_setter()),
        frozen: AtomicBool::new(false),
        copying: tokio::sync::Mutex::default(),
    });
    // A new session ends the streams of the one before, and so its tasks; this only makes it sure.
    let mut current = JoinSet::new();
    let mut background = JoinSet::new();
    background.spawn(serve_network(network.clone()));
    while let Some(session) = sessions.next().await {
        current.shutdown().await;
        network.set_session(session.handle.clone());
        current.spawn(serve_session(Arc::clone(&agent), session));
    }
}

/// Commands go on without a network when root in the sandbox has removed the device.
async fn serve_network(network: Network) {
    let error = network.run().await;
    log(&format!("the network has ended: {error}"));
}

async fn serve_session(agent: Arc<Agent>, session: GuestSession) {
    let GuestSession { handle, mut incoming } = session;
    let clients = async {
        while let Some((send, receive)) = incoming.next().await {
            tokio::spawn(serve_client(agent.stage.subscribe(), send, receive));
        }
    };
    let control = async {
        if let Err(error) = serve_control(&agent, &handle).await {
            log(&format!("the control stream ended: {error}"));
        }
        // Without it the node knows nothing: let it start a new session.
        handle.close();
    };
    tokio::join!(clients, control, serve_local_image(&agent, &handle));
}

async fn serve_client(stage: watch::Receiver<Stage>, send: MuxSend, receive: MuxRecv) {
    let ready = match &*stage.borrow() {
        Stage::Ready(services) => Ok(Arc::clone(services)),
        Stage::Failed(refusal) => Err(refusal.clone()),
        Stage::Unconfigured | Stage::Configuring => {
            Err(Refusal::new(StreamErrorCode::NotRunning, "the sandbox is still being made"))
        }
    };
    match ready {
        Ok(services) => serve(&services, receive, send).await,
        Err(refusal) => {
            let mut writer = FrameWriter::new(send);
            let _ = writer.send_message(FrameKind::Error, &refusal.to_message()).await;
            let _ = writer.finish().await;
        }
    }
}

async fn serve_local_image(agent: &Agent, handle: &MuxHandle) {
    let mut local_image = agent.local_image.subscribe();
    let requests = tokio::select! {
        found = local_image.wait_for(Option::is_some) => found.ok().and_then(|found| found.clone()),
        _ = handle.ended() => None,
    };
    if let Some(requests) = requests
        && let Err(error) = requests.serve(handle).await
        && !handle.is_ended()
    {
        log(&format!("the local image's stream ended: {error}"));
        handle.close();
    }
}

async fn serve_control(agent: &Arc<Agent>, handle: &MuxHandle) -> io::Result<()> {
    let (send, receive) = handle.open(Priority::Control)?;
    let (mut reader, mut writer) = (FrameReader::new(receive), FrameWriter::new(send));
    let mut stage = agent.stage.subscribe();
    let mut services = ready(&stage.borrow_and_update());
    let hello = Kind::Control(hello(services.is_some(), agent.frozen.load(Relaxed)));
    let open = StreamOpen { kind: Some(hello), ..StreamOpen::default() };
    writer.send_message(FrameKind::Open, &open).await?;
    if let Some(services) = &services {
        services.execs.repeat_main_exit();
    }
    let mut asked = false;
    loop {
        tokio::select! {
            frame = reader.next() => {
                let Some(frame) = frame? else { return Ok(()) };
                if frame.is(FrameKind::Configure) {
                    begin_configure(agent, decode(&frame)?);
                    asked = true;
                    stage.mark_changed();
                } else if frame.is(FrameKind::Command) {
                    take_command(agent, decode(&frame)?, services.as_ref());
                } else {
                    let kind = frame.kind;
                    return Err(invalid(format!("a frame of kind {kind} came on the control stream")));
                }
            }
            changed = stage.changed() => {
                changed.map_err(io::Error::other)?;
                let now = stage.borrow_and_update().clone();
                services = ready(&now);
                let error = match now {
                    Stage::Unconfigured | Stage::Configuring => continue,
                    Stage::Ready(_) => None,
                    Stage::Failed(refusal) => Some(refusal.to_message()),
                };
                if std::mem::take(&mut asked) {
                    writer.send_message(FrameKind::Configured, &GuestConfigured { error }).await?;
                }
            }
            event = next_event(services.as_ref()) => {
                if let Err(error) = writer.send_message(FrameKind::Event, &event).await {
                    if let Some(services) = &services {
                        services.execs.give_back(event);
                    }
                    return Err(error);
                }
            }
        }
    }
}

async fn next_event(services: Option<&Arc<Services>>) -> towline_proto::v1::GuestEvent {
    match services {
        Some(services) => services.execs.next_event().await,
        None => std::future::pending().await,
    }
}

fn ready(stage: &Stage) -> Option<Arc<Services>> {
    match stage {
        Stage::Ready(services) => Some(Arc::clone(services)),
        Stage::Unconfigured | Stage::Configuring | Stage::Failed(_) => None,
    }
}

/// Starts to configure, unless that was begun before: a node that comes back gets the one outcome.
fn begin_configure(agent: &Arc<Agent>, message: GuestConfigure) {
    let is_first = agent.stage.send_if_modified(|stage| {
        let first = matches!(stage, Stage::Unconfigured);
        if first {
            *stage = Stage::Configuring;
        }
        first
    });
    if !is_first {
        return;
    }
    if let Ok(marker) = message.resync_marker[..].try_into() {
        (agent.set_marker)(Marker::new(marker));
    }
    let agent = Arc::clone(agent);
    // Of its own: it goes on when the session is cut.
    tokio::spawn(async move {
        let outcome = match open_local_image(&agent, &message) {
            Ok(device) => Box::pin(configure(&message, device, agent.kernel)).await,
            Err(error) => Err(Refusal::io("cannot open /dev/fuse", &error)),
        };
        agent.stage.send_replace(match outcome {
            Ok(services) => Stage::Ready(Arc::new(services)),
            Err(refusal) => {
                log(&refusal.message);
                Stage::Failed(refusal)
            }
        });
    });
}

fn open_local_image(agent: &Agent, message: &GuestConfigure) -> io::Result<Option<fuse::Device>> {
    if !message.local_image {
        return Ok(None);
    }
    let (device, requests) = fuse::start()?;
    agent.local_image.send_replace(Some(requests));
    Ok(Some(device))
}

fn take_command(agent: &Arc<Agent>, message: GuestCommand, services: Option<&Arc<Services>>) {
    let kernel = agent.kernel;
    match message.command {
        Some(Command::Shutdown(Shutdown { grace_ms })) => {
            let services = services.cloned();
            tokio::spawn(async move {
                let workload = services.as_ref().map(|services| services.execs.workload());
                shut_down(workload, Duration::from_millis(grace_ms.into()), kernel).await;
            });
        }
        Some(Command::SetClock(clock)) => {
            if kernel == Kernel::Own
                && let Err(refusal) = set_clock(clock.unix_ns)
            {
                log(&refusal.message);
            }
        }
        Some(command @ (Command::Freeze(_) | Command::Thaw(_) | Command::Become(_))) => {
            if let Some(services) = services {
                tokio::spawn(copying(Arc::clone(agent), Arc::clone(services), command));
            }
        }
        // A later node's command: nothing that this agent could do.
        None => {}
    }
}

/// Does what leads to a copy, or makes this guest one.
async fn copying(agent: Arc<Agent>, services: Arc<Services>, command: Command) {
    let _one = agent.copying.lock().await;
    let event = match command {
        Command::Freeze(Freeze { fork_id }) => {
            let frozen = fork::freeze(&services, agent.kernel).await;
            agent.frozen.store(frozen.is_ok(), Relaxed);
            let error = frozen.err().map(|refusal| refusal.to_message());
            Event::Frozen(Frozen { fork_id, error })
        }
        Command::Become(order) => {
            let became = become_copy(&agent, &services, &order).await;
            let error = became.err().map(|refusal| refusal.to_message());
            Event::Became(Became { fork_id: order.fork_id, error })
        }
        _ => {
            fork::thaw(&services);
            return agent.frozen.store(false, Relaxed);
        }
    };
    services.execs.push_event(event);
}

async fn become_copy(agent: &Agent, services: &Services, order: &Become) -> Result<(), Refusal> {
    if !agent.frozen.load(Relaxed) {
        return Err(Refusal::invalid("the workload runs: it would share what it knows"));
    }
    let marker: [u8; 32] = order.resync_marker[..]
        .try_into()
        .map_err(|_| Refusal::invalid("the node gave no secret for the copy"))?;
    fork::become_copy(services, order).await?;
    (agent.set_marker)(Marker::new(marker));
    fork::thaw(services);
    agent.frozen.store(false, Relaxed);
    Ok(())
}

fn hello(configured: bool, frozen: bool) -> GuestHello {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    GuestHello {
        protocol: GUEST_PROTOCOL,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: read("/proc/sys/kernel/osrelease"),
        // Drawn when it is first read: not before this sandbox's entropy is in.
        boot_id: if configured { read("/proc/sys/kernel/random/boot_id") } else { String::new() },
        configured,
        frozen,
    }
}

fn decode<M: prost::Message + Default>(frame: &Frame) -> io::Result<M> {
    frame.decode().map_err(|error| invalid(error.to_string()))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Says something on the machine's console, or in its log where the kernel is the node's: there the
/// node finds a guest's last words.
pub fn log(message: &str) {
    use std::io::Write;
    let line = format!("<3>towline: {message}\n");
    match fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        Ok(mut console) => drop(console.write_all(line.as_bytes())),
        Err(_) => drop(writeln!(io::stderr(), "{message}")),
    }
}

//! smoke
use std::sync::Arc;
use tensorferry::*;
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
#[tokio::main]
async fn main() -> std::process::ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    match run().await { Ok(()) => 0.into(), Err(e) => { eprintln!("error: {e:?}"); e.code().exit_code().into() } }
}
async fn run() -> Result<(), Error> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut o = PushOptions::default();
    let mut listen = "127.0.0.1:7744".to_string();
    let mut pos = vec![];
    args.reverse();
    while let Some(a) = args.pop() {
        match a.as_str() {
            "--listen" => listen = args.pop().unwrap(),
            "--format" => { args.pop(); }
            "--chunk" => { args.pop(); o.chunk_len = Some(256 << 10); }
            "--retries" => { o.retries = args.pop().unwrap().parse().unwrap(); }
            "--durability" => o.commit_mode = match args.pop().unwrap().as_str() { "strict" => protocol::CommitMode::Strict, "end" => protocol::CommitMode::End, "none" => protocol::CommitMode::None, _ => protocol::CommitMode::Group },
            "--overwrite" => o.overwrite = true,
            "--restart" => o.restart = true,
            "--verify" => o.verify = true,
            _ => pos.push(a),
        }
    }
    match pos[0].as_str() {
        "serve" => {
            let s = Server::builder(&pos[1]).bind(listen.parse().unwrap()).await?;
            println!("{{\"event\":\"listening\",\"address\":\"{}\"}}", s.local_addr());
            s.serve(std::future::pending()).await?;
        }
        "push" => {
            let n = pos.len();
            let paths: Vec<_> = pos[1..n - 1].iter().map(|p| p.into()).collect();
            let src = Arc::new(source::SourceSet::open(&paths, &Default::default())?);
            let d = pos[n - 1].strip_prefix("ferry://").unwrap();
            let (h, name) = d.split_once('/').unwrap();
            let c = Client::new(h)?;
            let r = c.push(src, &name.parse()?, o).await?;
            println!("{{\"event\":\"done\",\"checkpoint\":\"{}\",\"tensors\":{},\"bytes\":{},\"wire_bytes\":{},\"resumed_bytes\":{},\"seconds\":{},\"durability\":\"{}\",\"bottleneck\":null}}", r.checkpoint, r.tensor_count, r.bytes, r.wire_bytes, r.resumed_bytes, r.elapsed.as_secs_f64(), r.durability.as_str());
        }
        _ => {}
    }
    Ok(())
}

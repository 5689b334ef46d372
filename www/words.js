"use strict";

/* Every word on the page, in both languages. `?lang=` decides, else the browser. */

const LANGUAGE = (() => {
  const wanted = new URLSearchParams(location.search).get("lang") || navigator.language;
  return wanted.toLowerCase().startsWith("zh") ? "zh-CN" : "en";
})();

const WORDS = {
  "views": ["Views", "视图"],
  "chat": ["Chat", "聊天"],
  "clock": ["Clock", "时钟"],
  "room": ["Room", "房间"],
  "other-language": ["中文", "English"],

  "chat-title": ["An answer, as it is written", "边写边看的回答"],
  "chat-lead": [
    "One request, one long response: each token is on your screen as soon as it exists. Reload, or open a second tab: the answer goes on.",
    "一次请求，一个长响应：每个词元一生成就出现在屏幕上。刷新页面，或再开一个标签页，回答都会继续。",
  ],
  "example-1": ["What is a long connection?", "什么是长连接？"],
  "example-2": ["SSE or WebSocket: which one for what?", "SSE 和 WebSocket 各适合什么场景？"],
  "example-3": ["How does a reader resume after a cut?", "断线之后，读者如何接着读？"],
  "conversation": ["Conversation", "对话"],
  "you": ["You", "你"],
  "answer": ["Answer", "回答"],
  "question": ["Your message", "你的消息"],
  "question-hint": ["Ask something", "问点什么"],
  "send": ["Send", "发送"],
  "stop": ["Stop", "停止"],
  "jump": ["Jump to latest", "跳到最新"],
  "fresh": ["New chat", "新对话"],
  "copy": ["Copy", "复制"],
  "copied": ["Copied", "已复制"],
  "again": ["Try again", "重试"],

  "chat-hello": ["Looking for the server", "正在寻找服务器"],
  "chat-ready": ["Ready. Model: {0}", "就绪。模型：{0}"],
  "chat-none": [
    "No server at {0}. To start one: python chatstream.py",
    "{0} 上没有服务器。启动方法：python chatstream.py",
  ],
  "chat-waiting": ["Waiting for the first token", "等待第一个词元"],
  "chat-receiving": ["Receiving", "正在接收"],
  "chat-lost": ["Connection lost. Trying again; nothing will be missed", "连接断开，正在重连；不会丢失内容"],
  "chat-resuming": ["Going on where it was", "从断点继续"],

  "stats-first": ["first token after {0} s", "首个词元 {0} 秒"],
  "stats-rate": ["{0} tokens/s", "每秒 {0} 个词元"],
  "stats-tokens": ["{0} tokens", "共 {0} 个词元"],
  "stats-total": ["{0} s in all", "用时 {0} 秒"],
  "stopped": ["Stopped", "已停止"],
  "answer-done": ["Answer: {0}", "回答：{0}"],
  "answer-stopped": ["Answer stopped: {0}", "回答已停止：{0}"],
  "trouble-failed": ["The answer broke off: {0}", "回答中断：{0}"],
  "trouble-refused": ["The server refused ({0}): {1}", "服务器拒绝了请求（{0}）：{1}"],
  "trouble-network": [
    "The server at {0} could not be reached.",
    "无法连接到服务器 {0}。",
  ],
  "trouble-lost": [
    "The server no longer has this answer: it was started anew, or the answer ended more than a minute ago. What had come is kept.",
    "服务器上已没有这个回答：它可能重新启动过，或者回答已结束一分钟以上。已收到的内容保留在此。",
  ],
  "trouble-interrupted": [
    "The page was left before the server had taken the question.",
    "服务器收到问题之前，页面就已离开。",
  ],

  "clock-title": ["The server’s clock", "服务器的时钟"],
  "clock-connecting": ["Connecting.", "正在连接。"],
  "clock-open": ["Connected.", "已连接。"],
  "clock-waiting": ["Connection lost, trying again.", "连接断开，正在重连。"],
  "clock-closed": ["Refused: {0}.", "被拒绝：{0}。"],
  "clock-age": ["Last tick {0} s ago.", "上次报时在 {0} 秒前。"],
  "clock-missed": ["{0} missed.", "错过 {0} 次。"],
  "ways-title": ["Three ways to be told the time", "报时的三种方式"],
  "ways-lead": [
    "The same ticks over three kinds of connection, measured here and now. Cut the network and see who catches up.",
    "同样的报时，经由三种连接送达，就在此刻此地测量。切断网络，看看谁能补上。",
  ],
  "cut": ["Cut the network for", "切断网络"],
  "cut-seconds": ["{0} s", "{0} 秒"],
  "cut-left": ["The network is cut.", "网络已切断。"],
  "cut-over": ["The network is back.", "网络已恢复。"],
  "polling": ["Polling", "短轮询"],
  "stream": ["SSE", "SSE"],
  "socket": ["WebSocket", "WebSocket"],
  "row-says": ["Says", "报时"],
  "row-state": ["State", "状态"],
  "row-strip": ["Last 30 s", "最近 30 秒"],
  "row-delay": ["Delay, last tick", "最近一次延迟"],
  "row-median": ["Delay, median", "延迟中位数"],
  "row-seen": ["Ticks seen", "收到"],
  "row-late": ["… of them caught up", "其中补发"],
  "row-missed": ["Never seen", "从未收到"],
  "row-connections": ["Connections", "连接数"],
  "row-requests": ["Requests", "请求数"],
  "row-sent": ["Bytes sent", "发送字节"],
  "row-received": ["Bytes received", "接收字节"],
  "row-cost": ["Bytes for each tick", "每次报时字节"],
  "state-idle": ["asking", "轮询中"],
  "state-connecting": ["connecting", "正在连接"],
  "state-open": ["open", "已打开"],
  "state-waiting": ["trying again", "正在重试"],
  "state-closed": ["refused", "被拒绝"],
  "state-failed": ["no answer", "无应答"],
  "strip": ["{0} on time, {1} late, {2} missing", "准时 {0}，迟到 {1}，缺失 {2}"],
  "legend-seen": ["on time", "准时"],
  "legend-late": ["caught up later", "事后补上"],
  "legend-missed": ["never seen", "从未收到"],
  "ways-note": [
    "Bytes are those of HTTP/1.1 and WebSocket, heads included, without TCP/IP. A page cannot see the heads that its browser sends; they are computed (≈). A delay counts from the full second, by this computer’s clock.",
    "字节数按 HTTP/1.1 与 WebSocket 计，含报文头，不含 TCP/IP。页面看不到浏览器发出的报文头，因此为推算值（≈）。延迟从整秒算起，以本机时钟为准。",
  ],

  "room-title": ["The room", "房间"],
  "room-lead": [
    "Everybody on this page hears what you say. Open a second tab to talk to yourself.",
    "页面上的每个人都能看到你说的话。再开一个标签页，就可以和自己聊。",
  ],
  "talk": ["What is said", "聊天记录"],
  "name": ["Your name", "你的名字"],
  "guest": ["Guest {0}", "访客{0}"],
  "join": ["Join", "加入"],
  "leave": ["Leave", "离开"],
  "message": ["Your message", "你的消息"],
  "message-hint": ["Say something", "说点什么"],
  "members": ["Here now: {0}", "在场人数：{0}"],
  "joined": ["{0} joined", "{0} 加入了"],
  "left": ["{0} left", "{0} 离开了"],
  "room-gap": ["Messages missed: {0}", "错过 {0} 条消息"],
  "room-connecting": ["Connecting", "正在连接"],
  "room-open": ["Connected", "已连接"],
  "room-waiting": ["Connection lost. Trying again; what is said meanwhile will follow", "连接断开，正在重连；期间的消息会补上"],
  "room-closed": ["", ""],
  "room-unsent": ["Not connected, so not sent yet: your text is kept", "未连接，尚未发送：你的文字已保留"],

  "wire": ["On the wire", "线上数据"],
  "wire-empty": ["Nothing yet.", "还没有数据。"],
  "wire-chat": ["Chat: SSE over fetch", "聊天：经 fetch 的 SSE"],
  "wire-polling": ["Clock: polling", "时钟：短轮询"],
  "wire-stream": ["Clock: SSE", "时钟：SSE"],
  "wire-socket": ["Clock: WebSocket", "时钟：WebSocket"],
  "wire-room": ["Room: WebSocket", "房间：WebSocket"],
  "wire-in": ["received", "收到"],
  "wire-out": ["sent", "发出"],
  "wire-note": ["note", "说明"],
  "wire-connecting": ["connecting", "正在连接"],
  "wire-open": ["open", "已打开"],
  "wire-waiting": ["gone; again in {0} s", "已断开；{0} 秒后重试"],
  "wire-closed": ["closed {0}", "已关闭 {0}"],

  // ---------------------------------------------------- the network, and the clock's picture
  "cut-count": ["Back in {0} s.", "{0} 秒后恢复。"],
  "refused-origin": [
    "{0} is not for pages from here. Its --allow-origin says which are.",
    "{0} 不接受来自这里的页面。启动参数 --allow-origin 决定接受哪些。",
  ],
};

function say(key, ...values) {
  const text = WORDS[key][LANGUAGE === "zh-CN" ? 1 : 0];
  return text.replace(/\{(\d)\}/g, (_, n) => values[n]);
}
